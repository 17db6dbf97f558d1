"""Transports: the moves of bytes that schedules are made of. They know no formats.

Every move is asynchronous: it returns a `Move`, and the buffers are not touched until its `wait()` has returned.
On CUDA `wait` only orders the current stream after the move; the host goes on. All ranks of a group make the same
moves in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions

from commq.collectives.capture import refuse_capture
from commq.collectives.lost import name_lost_ranks
from commq.collectives.memory import Memory, memory_of
from commq.collectives.plan import ring_bytes
from commq.collectives.slices import slice_bytes, slices

# What dist.all_to_all_single and dist.all_gather_into_tensor come to, by its name since torch 2.13 or before. Their
# checks cost the host as much as the call, twice for each bucket.
_ALL_TO_ALL = "all_to_all_single" if hasattr(dist.ProcessGroup, "all_to_all_single") else "alltoall_base"
_ALL_GATHER = "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"
_ALL_TO_ALL_OPTIONS, _ALL_GATHER_OPTIONS = AllToAllOptions(), AllgatherOptions()
_ALL_TO_ALL_OPTIONS.asyncOp = _ALL_GATHER_OPTIONS.asyncOp = True


class Move(Protocol):
    """Bytes under way."""

    def wait(self) -> object:
        """Return when they have arrived (CUDA: when the current stream has been told to wait for them)."""


class Transport(Protocol):
    """What a schedule needs to know about a group, and the moves within it. Ranks are those of the group."""

    rank: int
    world_size: int
    memory: Memory

    def all_to_all(self, send_WS: Tensor, recv_WS: Tensor) -> Move:
        """Row w of `send` goes to rank w; row w of `recv` comes from rank w. uint8, contiguous, (W, S)."""

    def all_to_all_v(
        self, send: Tensor, recv: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], *, longest: int = 0
    ) -> Move:
        """The same with rows of different lengths, in bytes. uint8, 1-D; lengths of zero cost nothing.

        longest: no rank has a longer row, where all know that; a transport may then cut rows that cross slow links.
        """

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> Move:
        """Row w of `out` comes from rank w. uint8, contiguous, (S,) and (W, S)."""

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Move:
        """The library's own all-reduce, in place: SUM of floats or int32, MAX of int32. It counts as a ring."""

    def broadcast(self, buffer: Tensor, src: int) -> Move:
        """Copy rank `src`'s buffer to all ranks. uint8, 1-D."""

    def send(self, buffer: Tensor, dst: int) -> Move:
        """Send a buffer to rank `dst`, which receives it. uint8, 1-D."""

    def recv(self, buffer: Tensor, src: int) -> Move:
        """Receive a buffer from rank `src`. uint8, 1-D."""

    def share(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order. Blocks: for what a group agrees on once."""


class C10d:
    """Moves over a process group of torch.distributed (NCCL, gloo)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        group = group if group is not None else dist.group.WORLD
        if group is None:
            raise RuntimeError("torch.distributed has no process group; call dist.init_process_group first")
        self.group = group
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of the group it was given")
        self.world_size = dist.get_world_size(self.group)
        self.memory = memory_of(self.group)
        # gloo's all-gather is seven times slower than its all-to-all of the same bytes.
        backends = dist.get_backend_config(self.group).split(",")  # such as cpu:gloo,cuda:nccl
        self._gather_by_all_to_all = {each.partition(":")[0] for each in backends if each.endswith(":gloo")}

    def all_to_all(self, send_WS: Tensor, recv_WS: Tensor) -> Move:
        rows, row_bytes = send_WS.shape
        self.memory.sent_bytes += (rows - 1) * row_bytes
        if (part := slice_bytes(send_WS, row_bytes, self)) < row_bytes:
            return self._in_slices(list(send_WS), list(recv_WS), slices(row_bytes, part))
        return self._call("all_to_all", getattr(self.group, _ALL_TO_ALL), recv_WS, send_WS, [], [], _ALL_TO_ALL_OPTIONS)

    def all_to_all_v(
        self, send: Tensor, recv: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], *, longest: int = 0
    ) -> Move:
        self.memory.sent_bytes += sum(send_splits) - send_splits[self.rank]
        if (part := slice_bytes(send, longest, self)) < longest:
            cuts = slices(longest, part)
            return self._in_slices(send.split(list(send_splits)), recv.split(list(recv_splits)), cuts)
        return self._start("all_to_all", dist.all_to_all_single, recv, send, list(recv_splits), list(send_splits))

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> Move:
        self.memory.sent_bytes += (self.world_size - 1) * row_S.numel()
        if row_S.device.type not in self._gather_by_all_to_all:
            return self._call(
                "all_gather", getattr(self.group, _ALL_GATHER), out_WS.view(-1), row_S, _ALL_GATHER_OPTIONS
            )
        copies_WS = self.memory.take(self.world_size, row_S.numel(), row_S.device)
        copies_WS.copy_(row_S.expand_as(copies_WS))
        move = self._call(
            "all_gather", getattr(self.group, _ALL_TO_ALL), out_WS, copies_WS, [], [], _ALL_TO_ALL_OPTIONS
        )
        move.lent = copies_WS
        return move

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Move:
        self.memory.sent_bytes += ring_bytes(tensor.numel(), tensor.element_size(), self.world_size)
        return self._start("all_reduce", dist.all_reduce, tensor, op)

    def broadcast(self, buffer: Tensor, src: int) -> Move:
        self.memory.sent_bytes += buffer.numel() if self.rank == src else 0
        return self._start("broadcast", dist.broadcast, buffer, group_src=src)

    def send(self, buffer: Tensor, dst: int) -> Move:
        self.memory.sent_bytes += buffer.numel()
        return self._start("send", _isend, buffer, group_dst=dst)

    def recv(self, buffer: Tensor, src: int) -> Move:
        return self._start("recv", _irecv, buffer, group_src=src)

    def share(self, value: Any) -> list[Any]:
        refuse_capture("what the ranks of a group agree on", "make the same call once before the capture")
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise name_lost_ranks(self.group, "all_gather", error) from error
        return values

    def _in_slices(self, send: Sequence[Tensor], recv: Sequence[Tensor], cuts: Iterable[slice]) -> Move:
        """Rows to and from every rank, cut alike on all. What is queued last ends last."""
        for part in cuts:
            move = self._start("all_to_all", dist.all_to_all, [row[part] for row in recv], [row[part] for row in send])
        return move

    def _start(self, operation: str, function: Any, *args: Any, **options: Any) -> _Started:
        return self._call(operation, function, *args, group=self.group, async_op=True, **options)

    def _call(self, operation: str, function: Any, *args: Any, **options: Any) -> _Started:
        try:
            return _Started(self, operation, function(*args, **options))
        except RuntimeError as error:
            raise name_lost_ranks(self.group, operation, error) from error


class _Started:
    """A move of `C10d`."""

    def __init__(self, transport: C10d, operation: str, work: dist.Work | None) -> None:
        self.lent: Tensor | None = None
        self._transport, self._operation, self._work = transport, operation, work

    def wait(self) -> None:
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise name_lost_ranks(self._transport.group, self._operation, error) from error
        self._work = None
        if self.lent is not None:
            self._transport.memory.give(self.lent)
            self.lent = None


def _isend(buffer: Tensor, *, group_dst: int, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
    return dist.isend(buffer, group=group, group_dst=group_dst)


def _irecv(buffer: Tensor, *, group_src: int, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
    return dist.irecv(buffer, group=group, group_src=group_src)


def check_equal(what: str, value: str, transport: Transport) -> None:
    """Raise the same ValueError on every rank unless all ranks hold the same `value`."""
    values = transport.share(value)
    if len(set(values)) > 1:
        other = next(rank for rank, v in enumerate(values) if v != values[0])
        raise ValueError(
            f"{what} differs between ranks: rank 0 has {values[0]}, rank {other} has {values[other]}; "
            "start every rank with the same one"
        )
