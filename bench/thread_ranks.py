"""Ranks that are threads of one process, for runs in which all ranks hold the same weights: bytes move by copies.

    ranks = Ranks(4)
    handles = ranks.run(lambda rank: commq.HookState("int4", transport=ranks.transports[rank]))
    ranks.run(lambda rank: handles[rank].exchange(bucket_of(rank)))

Between two moves a rank runs alone or beside others, as it comes; at a move it waits for all. On CUDA ranks may work on
streams of their own: at a move each one's stream waits for those of the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from commq.collectives.memory import Memory
from commq.collectives.plan import ring_bytes

T = TypeVar("T")
PATIENCE = 300.0
"""Seconds that a rank waits for the others before it gives up."""


class Ranks:
    """W ranks, and their transports: of the protocol in commq/collectives/transport.py, all but send and recv."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._pool = ThreadPoolExecutor(world_size)
        self._meetings: list[_Meeting] = []
        self.transports = self.split([range(world_size)])

    def split(self, groups: Sequence[Sequence[int]]) -> list[ThreadTransport]:
        """Every rank's transport in the one of the groups that it belongs to."""
        found: dict[int, ThreadTransport] = {}
        for group in groups:
            meeting = _Meeting(len(group))
            self._meetings.append(meeting)
            found |= {rank: ThreadTransport(meeting, number) for number, rank in enumerate(group)}
        return [found[rank] for rank in range(self.world_size)]

    def run(self, call: Callable[[int], T]) -> list[T]:
        """`call(rank)` on all ranks at once, without gradients; the first error of a rank that did not just wait."""

        def guarded(rank: int) -> T:
            try:
                with torch.no_grad():
                    return call(rank)
            except BaseException:
                for meeting in self._meetings:  # the others must not wait for this rank
                    meeting.abort()
                raise

        futures = [self._pool.submit(guarded, rank) for rank in range(self.world_size)]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]


class _Meeting:
    """Where the ranks of a group show each other what they send."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=PATIENCE)
        self._shown: list[Any] = [None] * world_size
        self._events: list[Any] = [None] * world_size

    def show(self, rank: int, value: Any, device: torch.device) -> list[Any]:
        """Everybody's value, in rank order, as their streams leave it. Read it, and `leave` before the next `show`."""
        self._shown[rank] = value
        self._wait_for_all(rank, device)
        return list(self._shown)

    def leave(self, rank: int, device: torch.device) -> None:
        """Nobody goes on, and writes to what it has shown, before all have read."""
        self._wait_for_all(rank, device)

    def abort(self) -> None:
        """Whoever waits, now or later, gets an error."""
        self._barrier.abort()

    def _wait_for_all(self, rank: int, device: torch.device) -> None:
        if device.type == "cuda":
            self._events[rank] = torch.cuda.current_stream(device).record_event()
        self._barrier.wait()
        if device.type == "cuda":
            events = list(self._events)
            self._barrier.wait()  # before one of them is replaced
            for event in events:
                event.wait(torch.cuda.current_stream(device))


class _Done:
    """A move that is over."""

    def wait(self) -> None:
        pass


class ThreadTransport:
    """One rank's moves."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.world_size, self.memory = rank, meeting.world_size, Memory()
        self._meeting = meeting

    def all_to_all(self, send_WS: Tensor, recv_WS: Tensor) -> _Done:
        self.memory.sent_bytes += send_WS.numel() - send_WS.shape[1]
        for row_S, theirs_WS in zip(recv_WS, self._show(send_WS), strict=True):
            row_S.copy_(theirs_WS[self.rank])
        return self._leave(send_WS.device)

    def all_to_all_v(
        self, send: Tensor, recv: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], *, longest: int = 0
    ) -> _Done:
        self.memory.sent_bytes += sum(send_splits) - send_splits[self.rank]
        everyone = self._meeting.show(self.rank, send.split(list(send_splits)), send.device)
        for run, theirs in zip(recv.split(list(recv_splits)), everyone, strict=True):
            run.copy_(theirs[self.rank])
        return self._leave(send.device)

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> _Done:
        self.memory.sent_bytes += (self.world_size - 1) * row_S.numel()
        for own_S, theirs_S in zip(out_WS, self._show(row_S), strict=True):
            own_S.copy_(theirs_S)
        return self._leave(row_S.device)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> _Done:
        """In rank order; a library may add floats in another one."""
        self.memory.sent_bytes += ring_bytes(tensor.numel(), tensor.element_size(), self.world_size)
        first, *others = self._show(tensor)
        total = first.clone()
        for other in others:
            total = torch.maximum(total, other) if op == dist.ReduceOp.MAX else total.add_(other)
        self._leave(tensor.device)
        tensor.copy_(total)
        return _Done()

    def broadcast(self, buffer: Tensor, src: int) -> _Done:
        self.memory.sent_bytes += buffer.numel() if self.rank == src else 0
        everyone = self._show(buffer)
        if self.rank != src:
            buffer.copy_(everyone[src])
        return self._leave(buffer.device)

    def share(self, value: Any) -> list[Any]:
        values = self._meeting.show(self.rank, value, torch.device("cpu"))
        self._meeting.leave(self.rank, torch.device("cpu"))
        return values

    def _show(self, tensor: Tensor) -> list[Tensor]:
        return self._meeting.show(self.rank, tensor, tensor.device)

    def _leave(self, device: torch.device) -> _Done:
        self._meeting.leave(self.rank, device)
        return _Done()
