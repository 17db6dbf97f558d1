"""Slices: over TCP, rows travel in pieces of their own, one after the other.

NCCL's point-to-point transfers keep up to a megabyte of every row under way. Where several such flows meet in the queue
of one slow link they stand in each other's way: they end at different times, and what travels against them, down to the
acknowledgements, waits behind them. Measured between 4 hosts at 1 Gbit/s, an all-to-all and an all-gather in turn: 96 %
of the line with 0.25 MB a peer, 83 % with 1 MB, 72 % with 2 MB; at 10 Gbit/s, 97 % with 2 MB. So what is sent to a peer
is cut: the next slice starts when the one before has arrived. Slices take about the same time on every link, since each
costs a start. Rings have one such flow a link and need none of this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from commq.collectives import link
from commq.collectives.hosts import find_hosts

if TYPE_CHECKING:
    from commq.collectives.transport import Transport

SLICE_NANOSECONDS = 6_000_000
"""How long a slice keeps the link busy."""
FEWEST_BYTES = 64 << 10
"""What a slice sends to a peer at least, on the slowest link; shorter rows are not worth a question."""
DEVICES = Path("/sys/class/infiniband")
_SLICE = "slice"


def slices(longest: int, nbytes: int) -> Iterator[slice]:
    """Where rows of at most `longest` bytes are cut into slices of at most `nbytes`: equally, at multiples of 16."""
    count = -(-longest // nbytes)
    step = -(-longest // (16 * count)) * 16
    for start in range(0, longest, step):
        yield slice(start, start + step)


def slice_bytes(rows: Tensor, longest: int, transport: Transport) -> int:
    """Bytes of a slice for rows of at most `longest`, which all ranks know: less than that if rows are to be cut.

    The first time a group of hosts asks, it measures its links, which takes up to a second.
    """
    if longest <= FEWEST_BYTES or not rows.is_cuda:
        return longest
    facts = transport.memory.facts
    if _SLICE not in facts:
        facts[_SLICE] = None  # rows travel whole while links are measured
        try:
            facts[_SLICE] = _measured(rows, transport) if over_tcp(transport) else None
        except BaseException:
            del facts[_SLICE]
            raise
    found: int | None = facts[_SLICE]
    return longest if found is None else min(found, longest)


def _measured(rows: Tensor, transport: Transport) -> int:
    rate = link.moves(transport, rows.device).bytes_per_second()
    share = rate * SLICE_NANOSECONDS // 1_000_000_000 // (transport.world_size - 1)
    return max(FEWEST_BYTES, share // 16 * 16)


def over_tcp(transport: Transport) -> bool:
    """Whether some of a group's links are TCP connections between hosts. All ranks ask together."""
    return find_hosts(transport).count > 1 and any(transport.share(not has_rdma()))


def has_rdma() -> bool:
    """Whether NCCL finds InfiniBand, RoCE or EFA here, and may use it."""
    if os.environ.get("NCCL_IB_DISABLE", "0") == "1" or os.environ.get("NCCL_NET", "").lower() == "socket":
        return False
    return DEVICES.is_dir() and any(DEVICES.iterdir())
