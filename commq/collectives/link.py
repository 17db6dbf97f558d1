"""Links: how long moves and codecs take in a group, measured once and agreed upon by all ranks.

Only differences between ranks in what they decide are dangerous, so every number is the largest over the ranks, an
integer, and the same everywhere. Measuring takes some tenths of a second, on a slow link up to a second; it happens
when a group first asks for schedule="auto".
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commq.collectives.capture import refuse_capture
from commq.collectives.hosts import Hosts

if TYPE_CHECKING:
    from commq.collectives.transport import Move, Transport

SIZES = tuple(4096 << (2 * i) for i in range(8))  # 4 KiB .. 64 MiB
"""Bytes of the moves that are timed."""
LONG_ENOUGH = 25_000_000
"""Nanoseconds after which no longer move is timed: its time is then that of its bytes."""
RUNS = 5


@dataclass(frozen=True)
class Curve:
    """Nanoseconds of an operation by its bytes: straight between points, beyond the last as between the last two."""

    points: tuple[tuple[int, int], ...]

    def nanoseconds(self, nbytes: int) -> int:
        if nbytes <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        i = min(max(bisect_left(self.points, (nbytes, 0)), 1), len(self.points) - 1)
        (n0, t0), (n1, t1) = self.points[i - 1], self.points[i]
        return t0 + (nbytes - n0) * (t1 - t0) // (n1 - n0)

    def bytes_per_second(self) -> int:
        """Of long operations, their start left out."""
        (n0, t0), (n1, t1) = self.points[-2:] if len(self.points) > 1 else ((0, 0), self.points[0])
        return (n1 - n0) * 1_000_000_000 // max(1, t1 - t0)


def rising(points: list[tuple[int, int]]) -> Curve:
    """A curve that never falls: a longer operation that was faster only shows noise in the shorter one."""
    for i in reversed(range(len(points) - 1)):
        points[i] = points[i][0], min(points[i][1], points[i + 1][1])
    return Curve(tuple(points))


def moves(transport: Transport, device: torch.device, among: str = "all", hosts: Hosts | None = None) -> Curve:
    """An all-to-all, by the bytes that each rank sends to others.

    among: "all"; or, all ranks at once, "inside" each of `hosts`, or "between" ranks of the same number on every host.
    """
    world_size, rank = transport.world_size, transport.rank
    peers: Sequence[int] = range(world_size)
    if hosts is not None and among != "all":
        inside, local = hosts.members[hosts.host_of[rank]], hosts.local_of[rank]
        peers = inside if among == "inside" else [members[local] for members in hosts.members]
    others = [peer for peer in peers if peer != rank]

    def build(nbytes: int) -> Callable[[], None]:
        row = max(1, nbytes // len(others))
        if among == "all":
            send, recv = (torch.zeros(world_size, row, dtype=torch.uint8, device=device) for _ in range(2))
            return lambda: _wait(transport.all_to_all(send, recv))
        splits = [row if peer in others else 0 for peer in range(world_size)]
        flat, into = (torch.zeros(row * len(others), dtype=torch.uint8, device=device) for _ in range(2))
        return lambda: _wait(transport.all_to_all_v(flat, into, splits, splits))

    return remember(transport, ("moves", among, device), lambda: _measure(transport, device, build))


def sums(transport: Transport, dtype: torch.dtype, device: torch.device) -> Curve:
    """The library's own all-reduce, by the bytes of the tensor: what a compressed one has to beat."""

    def build(nbytes: int) -> Callable[[], None]:
        tensor = torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=device)
        return lambda: _wait(transport.all_reduce(tensor, dist.ReduceOp.SUM))

    return remember(transport, ("sums", dtype, device), lambda: _measure(transport, device, build))


def remember(transport: Transport, key: Hashable, find: Callable[[], Curve]) -> Curve:
    """A curve from the group's memory, measured if it is not there. All ranks ask in the same order."""
    facts = transport.memory.facts
    if key not in facts:
        facts[key] = find()
    curve: Curve = facts[key]
    return curve


def agree(transport: Transport, nanoseconds: int) -> int:
    """The slowest rank's time, on every rank."""
    return max(1, *transport.share(nanoseconds))


def _measure(transport: Transport, device: torch.device, build: Callable[[int], Callable[[], None]]) -> Curve:
    points: list[tuple[int, int]] = []
    for nbytes in SIZES:
        points.append((nbytes, agree(transport, time_call(build(nbytes), device))))
        if points[-1][1] > LONG_ENOUGH:
            break
    return rising(points)


def time_call(call: Callable[[], None], device: torch.device) -> int:
    """Nanoseconds of a call on this rank: the fastest of RUNS after one that is not counted."""
    refuse_capture("a measurement", "make the same call once before the capture", device)
    times = []
    for _ in range(RUNS + 1):
        synchronize(device)
        start = time.perf_counter_ns()
        call()
        synchronize(device)
        times.append(time.perf_counter_ns() - start)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wait(move: Move) -> None:
    move.wait()
