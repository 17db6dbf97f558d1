"""Slices: over TCP, rows travel in pieces of their own, one after the other.

NCCL's point-to-point transfers keep up to a megabyte of every row under way. Where several such flows meet in the queue
of one slow link they stand in each other's way: they end at different times, and what travels against them, down to the
acknowledgements, waits behind them. Measured between 4 hosts at 1 Gbit/s, an all-to-all and an all-gather in turn: 96 %
of the line with 0.25 MB a peer, 83 % with 1 MB, 72 % with 2 MB. So what is sent to a peer is cut: the next slice starts
when the one before has arrived. Rings have one such flow a link and need none of this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from commq.collectives.hosts import find_hosts

if TYPE_CHECKING:
    from commq.collectives.transport import Transport

SLICE_BYTES = 256 << 10
"""What a peer is sent at once."""
DEVICES = Path("/sys/class/infiniband")


def slices(longest: int) -> Iterator[slice]:
    """Where rows of at most `longest` bytes are cut: as equally as can be, at multiples of 16 bytes."""
    count = -(-longest // SLICE_BYTES)
    step = -(-longest // (16 * count)) * 16
    for start in range(0, longest, step):
        yield slice(start, start + step)


def are_cut(rows: Tensor, longest: int, transport: Transport) -> bool:
    """Whether rows of at most `longest` bytes are. The same on all ranks."""
    return longest > SLICE_BYTES and rows.is_cuda and over_tcp(transport)


def over_tcp(transport: Transport) -> bool:
    """Whether some of the group's links are TCP connections between hosts. Found once, which all ranks do together."""
    facts = transport.memory.facts
    if "over TCP" not in facts:
        facts["over TCP"] = find_hosts(transport).count > 1 and any(transport.share(not has_rdma()))
    return bool(facts["over TCP"])


def has_rdma() -> bool:
    """Whether NCCL finds InfiniBand, RoCE or EFA here, and may use it."""
    if os.environ.get("NCCL_IB_DISABLE", "0") == "1" or os.environ.get("NCCL_NET", "").lower() == "socket":
        return False
    return DEVICES.is_dir() and any(DEVICES.iterdir())
