"""Reduce-scatter and all-gather of sharded tensors: several formats in one message, flat or in two hops.

A strip is one source of a message: C elements for each of W ranks, C a multiple of the source's unit, so that chunk w
of the plan is what belongs to rank w. A message travels in one piece: FSDP cuts models into pieces already.

    scatter   encode -> all-to-all -> decode and sum in fp32 (rank order)
    scatter   encode -> all-to-all inside the host -> decode and sum -> encode -> all-to-all between hosts
    (2 hops)         -> decode and sum in fp32 (host order)
    gather    encode -> all-gather -> decode
    gather    encode -> all-gather between ranks of one number on every host -> all-gather inside the host -> decode
    (2 hops)

In two hops rank j of a host works for the ranks of number j on all hosts. A host then sends P (n - 1) / n elements of a
scatter to others, and the same of a gather, n being the number of hosts; a flat exchange sends that once for each of
its ranks. Codes that are gathered are passed on as they are: whatever the hops, all ranks decode the same bytes.
Source: qgZ and qwZ of ZeRO++ (Wang et al. 2023), TLq-HS of SDP4Bit (Jia et al. 2024, section 3.2).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from commq.codecs.reference import Coding
from commq.codecs.rotation import unrotate
from commq.codecs.wire import Layout
from commq.collectives.hosts import Hosts
from commq.collectives.message import host_stream, send_stream
from commq.collectives.plan import Part, Plan
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Move, Transport

_Rows = Generator[Move, None, Tensor]
"""A part of a schedule that returns rows."""


@dataclass(frozen=True)
class Strip:
    """One source as tensors. Scatter: x of W * C elements, out of C; gather: x of C, out of W * C. Contiguous, 1-D."""

    x: Tensor
    out: Tensor
    coding: Coding
    residual: Tensor | None = None
    """Feedback of a scatter's first hop: as many elements as x."""
    residual_scales: Tensor | None = None
    decay: float = 0.0
    second_residual: Tensor | None = None
    """Classic feedback of a scatter's second hop: float32, C elements for each host."""
    adds: bool = False
    """What a gather decodes is added to `out` (in float32)."""


@dataclass(frozen=True)
class ShardMessage:
    """Strips, their plan, and what moves and encodes them."""

    plan: Plan
    strips: Sequence[Strip]
    transport: Transport
    codec: ModuleType
    hosts: Hosts | None = None
    """Travel in two hops between these hosts; None: flat."""
    divisor: float = 1.0
    """What the sums of a scatter are divided by."""

    @property
    def pairs(self) -> list[tuple[Part, Strip]]:
        return list(zip(self.plan.parts, self.strips, strict=True))

    def take(self, rows: int, nbytes: int) -> Tensor:
        """A buffer of (rows, nbytes); zeros where parts leave gaps, so that what is sent is never stale memory."""
        buffer = self.transport.memory.take(rows, nbytes, self.strips[0].x.device)
        return buffer if len(self.strips) == 1 else buffer.zero_()

    def give(self, *buffers: Tensor) -> None:
        self.transport.memory.give(*buffers)


def scatter(message: ShardMessage) -> Schedule:
    """Reduce-scatter: strip.out <- the sum of all ranks' parts for this rank, divided by `divisor`.

    Error of a flat one: sum over ranks of b(format, x_w) / divisor, with b the `error_bound`; in two hops, with s_h the
    exact sum of host h's ranks and e_h = sum of their b(inside, x_w): sum over hosts of (e_h + b(format, |s_h| + e_h))
    / divisor. Plus fp32 rounding of the sums and rounding to the output's dtype.
    """
    if message.hosts is None:
        incoming = yield from _scatter_flat(message)
    else:
        incoming = yield from _scatter_hops(message, message.hosts)
    for part, strip in message.pairs:
        total = message.codec.decode_sum(_bytes(incoming, part), part.layout, divisor=message.divisor)
        rotation = _coding(part, strip, part.layout, 0).rotation
        if rotation is not None:
            signs = rotation.sign_pattern(seed=strip.coding.seed, step=strip.coding.step, device=total.device)
            total = unrotate(total, rotation, signs)
        strip.out.copy_(total[: strip.out.numel()])
    message.give(incoming)


def _scatter_flat(message: ShardMessage) -> _Rows:
    plan, transport = message.plan, message.transport
    outgoing = message.take(plan.world_size, plan.row_bytes)
    for part, strip in message.pairs:
        _encode(message, part, strip, _bytes(outgoing, part), part.layout)
    incoming = message.take(plan.world_size, plan.row_bytes)
    yield transport.all_to_all(outgoing, incoming)

    message.give(outgoing)
    return incoming


def _scatter_hops(message: ShardMessage, hosts: Hosts) -> _Rows:
    plan, transport, codec = message.plan, message.transport, message.codec
    rank, world_size, count = transport.rank, plan.world_size, hosts.count
    host, local = hosts.host_of[rank], hosts.local_of[rank]
    rows = message.take(world_size, plan.inside_bytes)
    for part, strip in message.pairs:
        _encode(message, part, strip, _inside_bytes(rows, part), part.inside)
    # For each rank of the host, its own rows and those of its peers on other hosts.
    order = [hosts.members[to][j] for j in range(len(hosts.members[host])) for to in range(count)]
    outgoing = message.take(world_size, plan.inside_bytes)
    torch.stack([rows[to] for to in order], out=outgoing)
    message.give(rows)
    incoming = message.take(world_size, plan.inside_bytes)
    splits = _splits(world_size, hosts.members[host], count * plan.inside_bytes)
    yield transport.all_to_all_v(outgoing.view(-1), incoming.view(-1), splits, splits)

    message.give(outgoing)
    sums = message.take(count, plan.row_bytes)
    incoming_lnS = incoming.view(-1, count, plan.inside_bytes)
    for to in range(count):
        for part, strip in message.pairs:
            lost_C = strip.second_residual
            if lost_C is not None:
                lost_C = lost_C[to * part.layout.chunk_numel : (to + 1) * part.layout.chunk_numel]
            codec.decode_sum_encode(
                _inside_bytes(incoming_lnS[:, to], part),
                part.inside,
                _bytes(sums, part)[to],
                part.layout,
                _coding(part, strip, part.layout, host_stream(host)),
                chunk=hosts.members[to][local],
                residual_C=lost_C,
            )
    message.give(incoming)
    return (yield from _to_peers(message, hosts, sums))


def gather(message: ShardMessage) -> Schedule:
    """All-gather: strip.out <- every rank's x, in rank order. Error: `error_bound` of each rank's x."""
    plan, transport, hosts = message.plan, message.transport, message.hosts
    row = message.take(1, plan.row_bytes)
    for part, strip in message.pairs:
        layout = Layout(part.layout.format, strip.x.numel(), 1, part.layout.align)
        _encode(message, part, strip, _bytes(row, part), layout)
    if hosts is None:
        rows = message.take(plan.world_size, plan.row_bytes)
        yield transport.all_gather(row[0], rows)

    else:
        copies = message.take(hosts.count, plan.row_bytes)
        copies.copy_(row.expand_as(copies))
        own = yield from _to_peers(message, hosts, copies)
        rows = yield from _to_neighbours(message, hosts, own)
    message.give(row)
    for part, strip in message.pairs:
        coding = _coding(part, strip, part.layout, 0)
        message.codec.decode_bucket(_bytes(rows, part), part.layout, strip.out, coding, accumulate=strip.adds)
    message.give(rows)


def _to_peers(message: ShardMessage, hosts: Hosts, rows_nS: Tensor) -> _Rows:
    """Row h goes to the rank of the same number on host h; returns what came from there, in the order of hosts."""
    transport = message.transport
    local, nbytes = hosts.local_of[transport.rank], rows_nS.shape[1]
    # Bytes leave and arrive in the order of ranks, which need not be that of hosts.
    across = sorted(range(hosts.count), key=lambda host: hosts.members[host][local])
    splits = _splits(transport.world_size, [ranks[local] for ranks in hosts.members], nbytes)
    outgoing = _reordered(message, rows_nS, across)
    incoming = message.take(hosts.count, nbytes)
    yield transport.all_to_all_v(outgoing.view(-1), incoming.view(-1), splits, splits, longest=nbytes)

    message.give(outgoing)
    return _reordered(message, incoming, [across.index(host) for host in range(hosts.count)])


def _to_neighbours(message: ShardMessage, hosts: Hosts, rows_nS: Tensor) -> _Rows:
    """Pass the rows of all hosts' ranks of this number on, inside the host; returns all ranks' rows, in rank order."""
    transport, world_size = message.transport, message.plan.world_size
    neighbours = hosts.members[hosts.host_of[transport.rank]]
    copies = message.take(world_size, rows_nS.shape[1])
    copies.view(len(neighbours), *rows_nS.shape).copy_(rows_nS.expand(len(neighbours), *rows_nS.shape))
    incoming = message.take(world_size, rows_nS.shape[1])
    splits = _splits(world_size, neighbours, rows_nS.numel())
    yield transport.all_to_all_v(copies.view(-1), incoming.view(-1), splits, splits)

    message.give(copies, rows_nS)
    places = [hosts.local_of[rank] * hosts.count + hosts.host_of[rank] for rank in range(world_size)]
    return _reordered(message, incoming, places)


def leaving_bytes(row_bytes: int, hosts: Hosts, rank: int, *, hops: bool) -> int:
    """Bytes of one scatter or one gather that `rank` sends to other hosts; a flat one counted as an all-to-all."""
    others = hosts.count - 1 if hops else len(hosts.host_of) - len(hosts.members[hosts.host_of[rank]])
    return others * row_bytes


def _encode(message: ShardMessage, part: Part, strip: Strip, wire_WS: Tensor, layout: Layout) -> None:
    raw = layout.format.kind == "raw"  # nothing is lost that is worth feeding back
    message.codec.encode_bucket(
        strip.x,
        wire_WS,
        layout,
        _coding(part, strip, layout, send_stream(message.transport.rank)),
        residual_N=None if raw else strip.residual,
        residual_scales_G=None if raw else strip.residual_scales,
        decay=strip.decay,
    )


def _coding(part: Part, strip: Strip, layout: Layout, stream: int) -> Coding:
    """Nothing is rotated that is not encoded in the end."""
    rotation = None if part.layout.format.kind == "raw" else strip.coding.rotation
    rounding = strip.coding.rounding if layout.format.unbiased else "nearest"
    return replace(strip.coding, stream=stream, rotation=rotation, rounding=rounding)


def _bytes(rows_KS: Tensor, part: Part) -> Tensor:
    return rows_KS[:, part.offset : part.offset + part.layout.chunk_bytes]


def _inside_bytes(rows_KS: Tensor, part: Part) -> Tensor:
    return rows_KS[:, part.inside_offset : part.inside_offset + part.inside.chunk_bytes]


def _reordered(message: ShardMessage, rows_KS: Tensor, order: list[int]) -> Tensor:
    """Rows number order[0], order[1], ..."""
    if order == sorted(order):
        return rows_KS
    ordered = message.take(*rows_KS.shape)
    torch.stack([rows_KS[i] for i in order], out=ordered)
    message.give(rows_KS)
    return ordered


def _splits(world_size: int, peers: Sequence[int], nbytes: int) -> list[int]:
    """`nbytes` for each of the peers, nothing for other ranks."""
    return [nbytes if rank in peers else 0 for rank in range(world_size)]
