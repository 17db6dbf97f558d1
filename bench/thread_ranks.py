"""Ranks that are threads of one process, for runs in which all ranks hold the same weights: bytes move by copies.

    ranks = Ranks(4)
    handles = ranks.run(lambda rank: commq.HookState("int4", transport=ranks.transports[rank]))
    ranks.run(lambda rank: handles[rank].exchange(bucket_of(rank)))

Between two moves a rank runs alone or beside others, as it comes; at a move it waits for all. On CUDA all ranks queue
their work on the default stream, so the order of the host is that of the device.
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
from commq.collectives.transport import ring_bytes

T = TypeVar("T")
PATIENCE = 300.0
"""Seconds that a rank waits for the others before it gives up."""


class Ranks:
    """W ranks, and their transports: of the protocol in commq/collectives/transport.py, all but send and recv."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._pool = ThreadPoolExecutor(world_size)
        self._barrier = threading.Barrier(world_size, timeout=PATIENCE)
        self._shown: list[Any] = [None] * world_size
        self.transports = [ThreadTransport(self, rank) for rank in range(world_size)]

    def run(self, call: Callable[[int], T]) -> list[T]:
        """`call(rank)` on all ranks at once, without gradients; the first error of a rank that did not just wait."""

        def guarded(rank: int) -> T:
            try:
                with torch.no_grad():
                    return call(rank)
            except BaseException:
                self._barrier.abort()  # the others must not wait for this rank
                raise

        futures = [self._pool.submit(guarded, rank) for rank in range(self.world_size)]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]

    def show(self, rank: int, value: Any) -> list[Any]:
        """Everybody's value, in rank order. After it, `leave` before the next `show`."""
        self._shown[rank] = value
        self.meet()
        return list(self._shown)

    def meet(self) -> None:
        self._barrier.wait()


class _Done:
    """A move that is over."""

    def wait(self) -> None:
        pass


class ThreadTransport:
    """One rank's moves."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.world_size, self.memory = rank, ranks.world_size, Memory()
        self._ranks = ranks

    def all_to_all(self, send_WS: Tensor, recv_WS: Tensor) -> _Done:
        self.memory.sent_bytes += send_WS.numel() - send_WS.shape[1]
        for row_S, theirs_WS in zip(recv_WS, self._ranks.show(self.rank, send_WS), strict=True):
            row_S.copy_(theirs_WS[self.rank])
        return self._leave()

    def all_to_all_v(self, send: Tensor, recv: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]) -> _Done:
        self.memory.sent_bytes += sum(send_splits) - send_splits[self.rank]
        everyone = self._ranks.show(self.rank, send.split(list(send_splits)))
        for run, theirs in zip(recv.split(list(recv_splits)), everyone, strict=True):
            run.copy_(theirs[self.rank])
        return self._leave()

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> _Done:
        self.memory.sent_bytes += (self.world_size - 1) * row_S.numel()
        for own_S, theirs_S in zip(out_WS, self._ranks.show(self.rank, row_S), strict=True):
            own_S.copy_(theirs_S)
        return self._leave()

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> _Done:
        """In rank order; a library may add floats in another one."""
        self.memory.sent_bytes += ring_bytes(tensor, self.world_size)
        first, *others = self._ranks.show(self.rank, tensor)
        total = first.clone()
        for other in others:
            total = torch.maximum(total, other) if op == dist.ReduceOp.MAX else total.add_(other)
        self._ranks.meet()
        tensor.copy_(total)
        return self._leave()

    def broadcast(self, buffer: Tensor, src: int) -> _Done:
        self.memory.sent_bytes += buffer.numel() if self.rank == src else 0
        everyone = self._ranks.show(self.rank, buffer)
        if self.rank != src:
            buffer.copy_(everyone[src])
        return self._leave()

    def share(self, value: Any) -> list[Any]:
        values = self._ranks.show(self.rank, value)
        self._ranks.meet()
        return values

    def _leave(self) -> _Done:
        """Nobody goes on, and writes to what it sent, before all have read."""
        self._ranks.meet()
        return _Done()
