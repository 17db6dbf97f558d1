"""Clock: seconds spent in exchanges."""

from __future__ import annotations

from collections import deque

import torch

EVERY = 16
"""On CUDA one step in so many is timed in the long run: two events a bucket cost the host as much as a launch."""
PENDING = 256
"""Pairs of events that may wait to be read: asking whether they have passed costs the host more than keeping them."""

Pair = tuple[torch.cuda.Event, torch.cuda.Event]


class Clock:
    """Host time on the CPU; on CUDA the time of what was queued on the side stream, by events that are used again.

    On CUDA the first EVERY steps are timed, then one in EVERY, which counts for all of them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps, self._weight = 0, 1
        self._pairs: deque[tuple[Pair, int]] = deque()
        self._free: list[Pair] = []

    def next_step(self) -> None:
        """Another step begins."""
        self._steps += 1
        self._weight = 1 if self._steps < EVERY else EVERY if self._steps % EVERY == 0 else 0

    def add(self, seconds: float) -> None:
        """Of the host."""
        self._seconds += seconds

    def begin(self, stream: torch.cuda.Stream) -> Pair | None:
        """Count what is queued on `stream` from now on; None: not in this step."""
        if not self._weight:
            return None
        if len(self._pairs) >= PENDING:
            self._collect(wait=False)
        pair = self._free.pop() if self._free else self._pair()
        pair[0].record(stream)
        return pair

    def end(self, pair: Pair, stream: torch.cuda.Stream) -> None:
        """Up to here."""
        pair[1].record(stream)
        self._pairs.append((pair, self._weight))

    def seconds(self) -> float:
        """So far. Waits for the device."""
        self._collect(wait=True)
        return self._seconds

    def _pair(self) -> Pair:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _collect(self, *, wait: bool) -> None:
        while self._pairs and (wait or self._pairs[0][0][1].query()):
            (begin, end), weight = self._pairs.popleft()
            end.synchronize()
            self._seconds += weight * begin.elapsed_time(end) / 1e3
            self._free.append((begin, end))
