"""Moves over a communicator of MPI (mpi4py), in host memory. Imported only where a caller passes a communicator."""

from __future__ import annotations

import functools
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from commq.collectives.lost import PATIENCE, RankLostError
from commq.collectives.memory import Memory
from commq.collectives.plan import ring_bytes

TIMEOUT = 300.0
"""Seconds that a move waits for other ranks, unless `Mpi.timeout` is set."""

RUN_BYTES = 1 << 30
"""Longer messages travel in runs: MPI before version 4 counts bytes in 31 bits."""

ROLL_CALL = 32767
"""The highest tag that every MPI has; messages use those below, over and over."""

_DATATYPES = {torch.float32: MPI.FLOAT, torch.int32: MPI.INT32_T}
_OPERATIONS = ((dist.ReduceOp.SUM, MPI.SUM), (dist.ReduceOp.MAX, MPI.MAX))
_sched_yield = getattr(os, "sched_yield", functools.partial(time.sleep, 0.0))


class Mpi:
    """Moves over a communicator, for tensors on the CPU and of any length; make it with `Mpi.of`.

    It works on a duplicate, so its messages never meet the caller's own. timeout: seconds that each `wait` waits
    before it raises RankLostError; MPI itself would wait forever. An error leaves unfinished moves behind, after which
    the communicator is of no more use: end the job, with MPI.COMM_WORLD.Abort, because MPI's normal end waits for the
    lost ranks. `python -m mpi4py script.py` does so after an uncaught exception.
    """

    def __init__(self, comm: MPI.Comm, *, timeout: float = TIMEOUT) -> None:
        self.comm = comm.Dup()
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py raises what MPI returns
        self.rank, self.world_size = self.comm.Get_rank(), self.comm.Get_size()
        self.timeout = timeout
        self.memory = Memory()
        self.under_way: set[_Started] = set()
        """Moves that nobody has waited for yet. After an error nobody may, and MPI still writes to their tensors."""
        # Messages so far, for each peer: ranks that take no part in a send do not count it.
        self._sent: Counter[tuple[int, bool]] = Counter()
        self._received: Counter[tuple[int, bool]] = Counter()

    @classmethod
    def of(cls, comm: MPI.Comm, *, timeout: float | None = None) -> Mpi:
        """The transport of a communicator, the same one each time; it goes when the communicator is freed.

        The first call is collective. timeout: if given, sets the transport's. Raises ValueError.
        """
        if comm == MPI.COMM_NULL:
            raise ValueError("group: got MPI.COMM_NULL, expected a communicator that this process is a member of")
        if comm.Is_inter():
            raise ValueError("group: got an intercommunicator, expected an intracommunicator; see Intercomm.Merge")
        transport: Any = comm.Get_attr(_attribute())
        if transport is None:
            transport = cls(comm)
            comm.Set_attr(_attribute(), transport)
        if timeout is not None:
            transport.timeout = timeout
        return transport

    def all_to_all(self, send_WS: Tensor, recv_WS: Tensor) -> _Started:
        self.memory.sent_bytes += send_WS.numel() - send_WS.shape[1]
        return self._exchange("all_to_all", send_WS.unbind(), recv_WS.unbind())

    def all_to_all_v(
        self, send: Tensor, recv: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], *, longest: int = 0
    ) -> _Started:
        self.memory.sent_bytes += sum(send_splits) - send_splits[self.rank]
        return self._exchange("all_to_all", send.split(list(send_splits)), recv.split(list(recv_splits)))

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> _Started:
        self.memory.sent_bytes += (self.world_size - 1) * row_S.numel()
        return self._exchange("all_gather", [row_S] * self.world_size, out_WS.unbind())

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> _Started:
        operation = next((theirs for ours, theirs in _OPERATIONS if ours == op), None)
        wide = tensor.to(torch.float32) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
        if operation is None or wide.dtype not in _DATATYPES:
            raise TypeError(f"all_reduce: {op} of {tensor.dtype}, expected SUM of floats or int32, or MAX of int32")
        self.memory.sent_bytes += ring_bytes(wide.numel(), wide.element_size(), self.world_size)
        move = _Started(self, "all_reduce", rounds=(wide, tensor) if wide is not tensor else None)
        for run in _runs(wide):
            move.post(self.comm.Iallreduce, MPI.IN_PLACE, [run, _DATATYPES[wide.dtype]], operation, tensor=wide)
        return move

    def broadcast(self, buffer: Tensor, src: int) -> _Started:
        self.memory.sent_bytes += buffer.numel() if self.rank == src else 0
        move = _Started(self, "broadcast")
        for run in _runs(buffer):
            move.post(self.comm.Ibcast, [run, MPI.BYTE], src, tensor=buffer)
        return move

    def send(self, buffer: Tensor, dst: int) -> _Started:
        self.memory.sent_bytes += buffer.numel()
        move = _Started(self, "send")
        self._send(move, buffer, dst, alone=True)
        return move

    def recv(self, buffer: Tensor, src: int) -> _Started:
        move = _Started(self, "recv")
        self._receive(move, buffer, src, alone=True)
        return move

    def share(self, value: Any) -> list[Any]:
        # Not MPI's own allgather, which would wait forever for a lost rank.
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths_W = torch.empty(self.world_size, 8, dtype=torch.uint8)
        self.all_gather(torch.tensor([data.numel()]).view(torch.uint8), lengths_W).wait()
        lengths = lengths_W.view(torch.int64).view(-1).tolist()
        rows = torch.empty(sum(lengths), dtype=torch.uint8)
        self.all_to_all_v(data.repeat(self.world_size), rows, [data.numel()] * self.world_size, lengths).wait()
        return [pickle.loads(bytes(row.tolist())) for row in rows.split(lengths)]

    def silent_ranks(self) -> tuple[int, ...]:
        """Call the roll: the ranks that do not report within PATIENCE (at most `timeout`) that they wait, too."""
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        calls = {peer: self.comm.Irecv([None, MPI.BYTE], peer, ROLL_CALL) for peer in peers}
        for peer in peers:
            self.comm.Isend([None, MPI.BYTE], peer, ROLL_CALL)
        deadline = time.monotonic() + min(PATIENCE.total_seconds(), self.timeout)
        while calls and time.monotonic() < deadline:
            calls = {peer: call for peer, call in calls.items() if not call.Test()}
            time.sleep(1e-3)
        return tuple(calls)

    def _exchange(self, operation: str, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> _Started:
        """Send one tensor to every rank, receive one from every rank."""
        move = _Started(self, operation)
        incoming[self.rank].copy_(outgoing[self.rank])
        # Each rank begins with another peer. Receives first: what finds one waiting need not be stored in between.
        for i in range(1, self.world_size):
            peer = (self.rank - i) % self.world_size
            self._receive(move, incoming[peer], peer)
        for i in range(1, self.world_size):
            peer = (self.rank + i) % self.world_size
            self._send(move, outgoing[peer], peer)
        return move

    def _send(self, move: _Started, tensor: Tensor, peer: int, *, alone: bool = False) -> None:
        tag = self._tag(self._sent, peer, alone)
        for run in _runs(tensor):
            move.post(self.comm.Isend, [run, MPI.BYTE], peer, tag, tensor=tensor, peer=peer)

    def _receive(self, move: _Started, tensor: Tensor, peer: int, *, alone: bool = False) -> None:
        tag = self._tag(self._received, peer, alone)
        for run in _runs(tensor):
            move.post(self.comm.Irecv, [run, MPI.BYTE], peer, tag, tensor=tensor, peer=peer)

    def _tag(self, counter: Counter[tuple[int, bool]], peer: int, alone: bool) -> int:
        """The next message's tag. Those of `send` and `recv` may overtake those of collectives, as with c10d."""
        number = counter[peer, alone]
        counter[peer, alone] += 1
        return 2 * (number % (ROLL_CALL // 2)) + alone


class _Part(NamedTuple):
    """A request, the tensor that it reads or writes, and the rank that it depends on if that is one."""

    request: MPI.Request
    tensor: Tensor
    peer: int | None


class _Started:
    """A move of `Mpi`. rounds: a tensor whose values go to another one at the end."""

    def __init__(self, transport: Mpi, operation: str, *, rounds: tuple[Tensor, Tensor] | None = None) -> None:
        self._transport, self._operation, self._rounds = transport, operation, rounds
        self._parts: list[_Part] = []

    def post(self, function: Callable[..., MPI.Request], *args: Any, tensor: Tensor, peer: int | None = None) -> None:
        """Start a request."""
        self._transport.under_way.add(self)
        try:
            self._parts.append(_Part(function(*args), tensor, peer))
        except MPI.Exception as error:
            raise self._failed(error, peer) from error

    def wait(self) -> None:
        begin = time.monotonic()
        while self._parts:
            if self._done(self._parts[-1]):
                self._parts.pop()
                continue
            waited = time.monotonic() - begin
            if waited > self._transport.timeout:
                raise self._late()
            # MPI would spin; ranks may be more than cores.
            if waited < 1e-4:
                _sched_yield()
            else:
                time.sleep(min(1e-3, waited / 16))
        self._transport.under_way.discard(self)
        if self._rounds is not None:
            wide, tensor = self._rounds
            tensor.copy_(wide)
            self._rounds = None

    def _done(self, part: _Part) -> bool:
        try:
            return part.request.Test()
        except MPI.Exception as error:
            raise self._failed(error, part.peer) from error

    def _failed(self, error: MPI.Exception, peer: int | None) -> RuntimeError:
        who = "" if peer is None else f" with rank {peer}"
        return RuntimeError(f"{self._where()}{who} failed. MPI said: {error}")

    def _late(self) -> RuntimeError:
        awaited = {part.peer for part in self._parts if not self._done(part)}
        silent = self._transport.silent_ranks()
        limit = f"{self._where()} did not end within {self._transport.timeout:g} s"
        if not silent:
            return RuntimeError(
                f"{limit}, though all ranks wait: they do not make the same calls in the same order, or the link needs "
                "longer; set the timeout of commq.collectives.mpi.Mpi.of(comm)"
            )
        # Who waits for a rank that waits for a lost one should hear of the lost one.
        missing = tuple(rank for rank in silent if rank in awaited) or silent
        names = ", ".join(map(str, missing))
        return RankLostError(
            f"{limit}: nothing from {'rank' if len(missing) == 1 else 'ranks'} {names}. Look at the output there, end "
            "the job (MPI.COMM_WORLD.Abort) and restart it from its last checkpoint; if ranks may be that late, set "
            "the timeout of commq.collectives.mpi.Mpi.of(comm)",
            missing,
        )

    def _where(self) -> str:
        return f"rank {self._transport.rank} of {self._transport.world_size}: {self._operation}"


def _runs(tensor: Tensor) -> Iterator[MPI.buffer]:
    """A tensor's memory, in runs that every MPI can count."""
    if tensor.device.type != "cpu":
        raise TypeError(
            f"MPI: tensor on {tensor.device}, expected host memory; pass a tensor on the CPU, or as group= an NCCL "
            "process group (torch.distributed.new_group)"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"MPI: strides {tensor.stride()} of shape {tuple(tensor.shape)}, expected contiguous memory")
    nbytes = tensor.numel() * tensor.itemsize
    for start in range(0, nbytes, RUN_BYTES):
        yield MPI.buffer.fromaddress(tensor.data_ptr() + start, min(RUN_BYTES, nbytes - start))


@functools.cache
def _attribute() -> int:
    """The key under which communicators keep their transport, so that a new one never finds that of a freed one."""
    return MPI.Comm.Create_keyval(delete_fn=lambda comm, key, transport: transport.comm.Free())
