"""Clock: seconds spent in exchanges."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PENDING = 256
"""Pairs of events that may wait to be read: asking whether they have passed costs the host more than keeping them."""


class Clock:
    """Host time on the CPU; on CUDA the time of what was queued on the side stream, by events that are used again."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what happens inside; on CUDA on the current stream."""
        if device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start
            return
        if len(self._pairs) >= PENDING:
            self._collect(wait=False)
        pair = self._free.pop() if self._free else self._pair()
        pair[0].record()
        yield
        pair[1].record()
        self._pairs.append(pair)

    def seconds(self) -> float:
        """So far. Waits for the device."""
        self._collect(wait=True)
        return self._seconds

    def _pair(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _collect(self, *, wait: bool) -> None:
        while self._pairs and (wait or self._pairs[0][1].query()):
            begin, end = pair = self._pairs.popleft()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
            self._free.append(pair)
