"""A group that moves nothing and codecs that do nothing: what an exchange borrows, found on tensors without data."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from commq.collectives.hosts import HOSTS, Hosts
from commq.collectives.memory import Memory
from commq.collectives.transport import Move


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Counter(Memory):
    """Counts bytes that are lent."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def count(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)

    def take(self, rows: int, nbytes: int, device: torch.device) -> Tensor:
        self.count(rows * nbytes)
        return torch.empty(rows, nbytes, dtype=torch.uint8, device="meta")

    def give(self, *buffers: Tensor) -> None:
        self.count(-sum(buffer.untyped_storage().nbytes() for buffer in buffers))


class Idle:
    """Rank 0 of a group that moves nothing. gloo: all-gathers borrow copies, as those of C10d do there."""

    def __init__(self, world_size: int, hosts: int, gloo: bool) -> None:
        self.rank, self.world_size, self.gloo = 0, world_size, gloo
        self.counter = Counter()
        self.memory: Memory = self.counter
        self.memory.facts[HOSTS] = Hosts(tuple(rank * hosts // world_size for rank in range(world_size)))

    def share(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def all_to_all(self, *_: Any, **__: Any) -> Move:
        return _Lent(self.counter, 0)

    all_to_all_v = broadcast = send = recv = all_to_all

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> Move:
        return _Lent(self.counter, out_WS.numel() if self.gloo else 0)

    def all_reduce(self, tensor: Tensor, op: Any) -> Move:
        return _Lent(self.counter, nbytes(tensor))


class _Lent:
    """A move that holds `nbytes` until it is done."""

    def __init__(self, memory: Counter, nbytes: int) -> None:
        self._memory, self._nbytes = memory, nbytes
        memory.count(nbytes)

    def wait(self) -> None:
        self._memory.count(-self._nbytes)


SILENT = ModuleType("silent")
"""Codecs that do nothing."""
for _name in ("encode_bucket", "decode_bucket", "decode_sum_encode"):
    setattr(SILENT, _name, lambda *_, **__: None)
setattr(SILENT, "decode_sum", lambda wire_KS, layout, **_: torch.empty(layout.chunk_numel, device="meta"))  # noqa: B010
