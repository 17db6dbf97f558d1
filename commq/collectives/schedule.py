"""Schedules: how a message travels, written as straight-line code.

A schedule is a generator that yields each `Move` it has started and goes on when the move is done:

    outgoing = encode(...)
    yield transport.all_to_all(outgoing, incoming)
    answer = decode_sum_encode(incoming)
    yield transport.all_gather(answer, answers)
    decode(answers)

So one schedule can be run alone, and the schedules of several pieces can be interleaved: while one piece travels,
the next is encoded. The order depends on the plan alone, so it is the same on all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable

from commq.collectives.transport import Move

Schedule = Generator[Move, None, None]

DEPTH = 3
"""Pieces under way at once: one being encoded or decoded, two travelling, so that the link never waits."""


class Exchange:
    """Schedules that run one after the other, up to DEPTH at a time. `start` returns at the first waits."""

    def __init__(self, schedules: Iterable[Schedule]) -> None:
        self._waiting = iter(schedules)
        self._active: deque[tuple[Schedule, Move]] = deque()

    def start(self) -> None:
        """Start the first moves."""
        while len(self._active) < DEPTH and self._start_next():
            pass

    def finish(self) -> None:
        """Run everything to its end."""
        self.start()
        while self._active:
            schedule, move = self._active.popleft()
            move.wait()
            if not self._advance(schedule):
                self._start_next()

    def _start_next(self) -> bool:
        return any(self._advance(schedule) for schedule in self._waiting)

    def _advance(self, schedule: Schedule) -> bool:
        """Run `schedule` up to its next move; False if it has ended."""
        move = next(schedule, None)
        if move is not None:
            self._active.append((schedule, move))
        return move is not None


def run(schedule: Schedule) -> None:
    """Run one schedule to its end."""
    Exchange([schedule]).finish()
