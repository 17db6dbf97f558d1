"""Roll call: which rank of a group has died, for moves whose waiting is not ours (a pipeline's schedule).

In a pipeline the neighbours of a rank that dies see it at once, and all others wait for their neighbours. So each rank
has a thread that answers, through the group's store, when anybody calls the roll: who does not is dead. The first
verdict stands; ranks that come to an error later, because a survivor has left, give that one.
"""

from __future__ import annotations

import atexit
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from commq.collectives.lost import RankLostError
from commq.collectives.memory import memory_of

PERIOD = 0.5
"""Seconds between two looks at the store."""
PATIENCE = timedelta(seconds=5)
"""How long ranks have to answer."""
_CALLS, _VERDICT = "commq/roll/calls", "commq/roll/verdict"


class RollCall:
    """While entered, a RuntimeError of a transport becomes a RankLostError that names the ranks that are dead.

    One that no dead rank explains leaves as it is. The group's ranks all enter, and may as often as they like. The
    transport must report a lost peer as an error: gloo does; NCCL's watchdog ends the process instead.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._thread: threading.Thread | None = None
        self._answered, self._over = 0, threading.Event()

    @staticmethod
    def of(group: dist.ProcessGroup) -> RollCall:
        """The group's: one thread is enough."""
        facts = memory_of(group).facts
        if RollCall not in facts:
            facts[RollCall] = RollCall(group)
        found: RollCall = facts[RollCall]
        return found

    def __enter__(self) -> None:
        if self._thread is None:
            self._store = self._group.get_group_store()
            self._thread = threading.Thread(target=self._answer, name="commq-roll-call", daemon=True)
            self._thread.start()
            atexit.register(self._end)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, RankLostError):
            return
        try:
            lost = self._call()
        except RuntimeError as silent:
            raise RankLostError(
                f"rank {self._rank} of {self._world_size}: a step failed, and the store that holds the job together "
                f"does not answer ({str(silent).splitlines()[0]}): the process that holds it, rank 0 unless a launcher "
                f"does, is probably gone. The transport said: {error}",
                (),
            ) from error
        if lost:
            names = ", ".join(map(str, lost))
            raise RankLostError(
                f"rank {self._rank} of {self._world_size}: a step failed: rank {names} has died. Look at its output "
                f"and restart the job from its last checkpoint. The transport said: {error}",
                lost,
            ) from error

    def _call(self) -> tuple[int, ...]:
        """The ranks that do not answer."""
        if self._store.check([_VERDICT]):
            return _read(self._store.get(_VERDICT))
        number = self._store.add(_CALLS, 1)
        keys = [f"commq/roll/{number}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], "")
        deadline, pause = time.monotonic() + PATIENCE.total_seconds(), threading.Event()
        missing = list(range(self._world_size))
        # Not store.wait: it would keep the store from the thread, which may have another call to answer meanwhile.
        while missing := [rank for rank in missing if not self._store.check([keys[rank]])]:
            if time.monotonic() > deadline:
                break
            pause.wait(PERIOD / 5)
        if not missing:
            return ()
        return _read(self._store.compare_set(_VERDICT, "", ",".join(map(str, missing))))

    def _answer(self) -> None:
        """Until the store is gone, or the process ends."""
        try:
            while not self._over.wait(PERIOD):
                called = self._store.add(_CALLS, 0)
                for number in range(self._answered + 1, called + 1):
                    self._store.set(f"commq/roll/{number}/{self._rank}", "")
                self._answered = called
        except RuntimeError:
            return

    def _end(self) -> None:
        """A thread that the interpreter finds in the store when it ends would abort the process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(PATIENCE.total_seconds())


def _read(verdict: bytes) -> tuple[int, ...]:
    return tuple(int(rank) for rank in verdict.decode().split(","))
