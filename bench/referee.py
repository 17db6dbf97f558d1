"""What ranks agree on outside of what is timed: over gloo, in a group of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lab import set_rate


class Referee:
    """One rank's. All ranks make the same calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.group = dist.new_group(backend="gloo")

    def start(self) -> None:
        """All ranks go on together, with nothing left on the device."""
        self._settle()
        dist.barrier(self.group)

    def seconds(self, call: Callable[[], object]) -> float:
        """Of a call, until the device is done with it, on this rank."""
        start = time.perf_counter()
        call()
        self._settle()
        return time.perf_counter() - start

    def largest(self, value: float) -> float:
        """Of all ranks."""
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return float(found)

    def share(self, value: Any) -> list[Any]:
        """Every rank's, in rank order."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def set_rate(self, rate: str) -> None:
        """Of all links, while nothing travels."""
        self.start()
        if dist.get_rank() == 0:
            set_rate(rate)
        dist.barrier(self.group)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
