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
from collections.abc import Callable, Generator, Iterable

from torch.autograd import profiler

from commq.collectives.transport import Move

Schedule = Generator[Move, None, None]

DEPTH = 4
"""Moves under way at once, at most."""


class Exchange:
    """Schedules that run like a systolic array: one starts, then each of those under way goes on by one move.

    With two_shot the link has the all-to-all of one piece and the all-gather of the piece before in its queue while
    a third is encoded, summed or decoded, so it never waits for codecs that are faster than it is. A schedule may be
    added long after the ones before it: their moves travel meanwhile.
    """

    def __init__(self, schedules: Iterable[Schedule] = ()) -> None:
        self._waiting = iter(schedules)
        self._active: deque[tuple[Schedule, Move, int, Callable[[], None] | None]] = deque()

    def start(self) -> None:
        """Start the first moves, and wait for none."""
        while len(self._active) < DEPTH:
            schedule = next(self._waiting, None)
            if schedule is None:
                return
            self._advance(schedule)

    def add(self, schedule: Schedule, ended: Callable[[], None] | None = None) -> None:
        """Start a schedule, then let those under way go on, the oldest move first. `ended` is called at its end."""
        before = len(self._active)
        self._advance(schedule, ended)
        for _ in range(before):
            self._go_on()
        while len(self._active) > DEPTH:
            self._go_on()

    def finish(self) -> None:
        """Run everything to its end."""
        for schedule in self._waiting:
            self.add(schedule)
        while self._active:
            self._go_on()

    def abandon(self) -> None:
        """Forget what is under way. Its buffers are not given back: moves may still write to them."""
        self._active.clear()

    def _go_on(self) -> None:
        schedule, move, stage, ended = self._active.popleft()
        move.wait()
        self._advance(schedule, ended, stage + 1)

    def _advance(self, schedule: Schedule, ended: Callable[[], None] | None = None, stage: int = 0) -> None:
        """Run `schedule` up to its next move. torch.profiler shows the range as commq::two_shot.0, .1, .2."""
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"commq::{getattr(schedule, '__name__', 'schedule')}.{stage}"):
                move = next(schedule, None)
        else:
            move = next(schedule, None)
        if move is not None:
            self._active.append((schedule, move, stage, ended))
        elif ended is not None:
            ended()


def run(schedule: Schedule) -> None:
    """Run one schedule to its end."""
    Exchange([schedule]).finish()
