"""One bit: a ring in which partial sums travel as one bit an element, at every hop, and stay right on average.

    encode -> W - 1 hops of (receive, merge the own bits in, pass on) -> all-gather -> decode

A partial sum is a bit r and, for each block, S: it stands for S * r. A rank whose own code is s * b merges it in by

    where r == b the bit is r, else r with probability S / (S + s) and b otherwise;  S <- S + s

On average nothing is lost: E[bit] (S + s) = (S / (S + s) r + s / (S + s) b) (S + s) = S r + s b, so by induction the
sum's expectation is that of the ranks' codes. With equal scales this is the (m - 1) / m of Marsit ("Sign bit is
enough", Wu et al., DAC 2022), and the chance of +1 is the share of ranks that have +1. Signs of partial sums, taken
anew at every hop, would have no such property.

It sends what two_shot sends with format sign, but only to the next rank until the answer, and the answer is one of
+S or -S: unbiased and coarse, where two_shot's is biased and near the mean. It takes W moves in place of two.

Blocks are dealt to their owners like cards, block g of the tensor to rank g mod W, so a block starts its way round
the ring at the same rank however the tensor is cut into pieces, and its bits are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from commq.codecs.formats import get_format
from commq.codecs.philox import random_u16
from commq.codecs.reference import Coding
from commq.codecs.rounding import offset
from commq.codecs.scales import as_float, magnitude_bits
from commq.codecs.wire import Layout, pack, unpack
from commq.collectives.message import Message, PartOperand, send_stream
from commq.collectives.plain import plain
from commq.collectives.plan import ceil16
from commq.collectives.schedule import Schedule

_NAN = 0x7FC00000


def merge_stream(rank: int) -> int:
    """Philox stream of the merges of a rank, which merges into each block once; apart from those of its rounding."""
    return 1 << 30 | rank


def one_bit(message: Message) -> Schedule:
    """All-reduce a piece. The result of an element is +S or -S over the divisor, S the sum of the ranks' scales s_w.

    Its expectation is sum_w s_w b_w / divisor, with the codes s_w b_w of the ranks: mean |x| of the block times the
    sign (rounding nearest), or largest |x| and a random sign whose expectation is the element (stochastic). Random
    numbers have 16 bits, so a probability is right within 2**-17 and the expectation within 2**-16 (W - 1) S / divisor.
    Variance: (S**2 - (sum_w s_w b_w)**2) / divisor**2 for given codes. Bound: |result - exact mean| <= S / W +
    |exact mean|. With a rotation all of this holds for the rotated elements, and expectations for the elements, too.
    A block that is not finite on one rank, or whose S is not, is NaN on all. Scales are fp32 whatever the format says.
    Raw parts travel as in `plain`. ValueError for formats other than sign, before anything is sent.
    """
    transport, world_size = message.transport, message.transport.world_size
    rank, after, before = transport.rank, (transport.rank + 1) % world_size, (transport.rank - 1) % world_size
    parts = [part for part in message.parts if _encodes(part)]
    raw = tuple(part.part for part in message.parts if part.part.layout.format.kind == "raw")
    if raw:
        yield from plain(replace(message, plan=replace(message.plan, parts=raw)), narrows=False)
    if not parts:
        return
    rings, nbytes = [], 0
    for part in parts:
        rings.append(_Ring(part, rank, nbytes))
        nbytes = ceil16(nbytes + rings[-1].layout.chunk_bytes)

    own_WS = message.take(world_size, nbytes)
    for ring in rings:
        codes = message.take(world_size, ring.layout.chunk_bytes)
        message.codec.encode_bucket(
            ring.part.x,
            codes,
            ring.layout,
            ring.coding,
            residual_N=ring.part.residual,
            residual_scales_G=ring.part.residual_scales,
            decay=ring.part.decay,
            blocks=ring.part.blocks,
        )
        deal(codes, ring.here(own_WS), ring.layout)
        message.give(codes)
    sent_S, received_S = own_WS[before], message.take(1, nbytes)[0]
    send_splits, recv_splits = ([nbytes * (w == to) for w in range(world_size)] for to in (after, before))
    for hop in range(world_size - 1):
        yield transport.all_to_all_v(sent_S, received_S, send_splits, recv_splits)
        owner = (rank - 2 - hop) % world_size
        for ring in rings:
            ring.merge(ring.here(received_S[None]), ring.here(own_WS[owner : owner + 1]), owner)
        sent_S = own_WS[owner]  # the merge was written over the own codes

    for ring in rings:
        ring.divide(ring.here(own_WS[rank : rank + 1]), message.divisor)
    answers_WS = message.take(world_size, nbytes)
    yield transport.all_gather(own_WS[rank], answers_WS)

    for ring in rings:
        codes = message.take(world_size, ring.layout.chunk_bytes)
        gather_up(ring.here(answers_WS), codes, ring.layout)
        message.codec.decode_bucket(codes, ring.layout, ring.part.out, ring.coding)
        message.give(codes)
    message.give(own_WS, received_S, answers_WS)


def _encodes(part: PartOperand) -> bool:
    """Whether a part is encoded at all. ValueError if it is not one bit an element."""
    fmt = part.part.layout.format
    if fmt.kind not in ("sign", "raw"):
        raise ValueError(
            f"one_bit: format {fmt.name!r}: its merge chooses between two signs; use sign, or schedule two_shot"
        )
    return fmt.kind == "sign"


def deal(rows_WS: Tensor, dealt_WS: Tensor, layout: Layout) -> None:
    """From rows of consecutive blocks to rows where block g of the tensor is in row g mod W."""
    _move(rows_WS, dealt_WS, layout, layout.chunk_blocks, layout.chunks)


def gather_up(dealt_WS: Tensor, rows_WS: Tensor, layout: Layout) -> None:
    """The opposite of `deal`."""
    _move(dealt_WS, rows_WS, layout, layout.chunks, layout.chunk_blocks)


def _move(source_WS: Tensor, target_WS: Tensor, layout: Layout, rows: int, columns: int) -> None:
    """Transpose the (rows, columns) matrix of blocks that the source holds, codes and scales."""
    target_WS[:, : layout.chunk_bytes].zero_()  # the padding between sections
    for section in (layout.codes, layout.scales):
        blocks = section(source_WS).reshape(rows, columns, -1).transpose(0, 1)
        section(target_WS).copy_(blocks.reshape(layout.chunks, -1))


class _Ring:
    """One part on its way round. Rows hold C elements in G blocks of B."""

    def __init__(self, part: PartOperand, rank: int, start: int) -> None:
        planned = part.part.layout
        sign = get_format("sign", block=planned.format.block, scale="fp32")
        self.part, self.rank, self.start = part, rank, start
        self.layout = Layout(sign, planned.numel, planned.chunks, planned.align)
        self.coding: Coding = replace(part.coding, stream=send_stream(rank))

    def here(self, rows_KS: Tensor) -> Tensor:
        """The part's bytes in rows of the ring."""
        return rows_KS[:, self.start : self.start + self.layout.chunk_bytes]

    def merge(self, received_1S: Tensor, own_1S: Tensor, owner: int) -> None:
        """Merge a row into the own one, in place. owner: the rank whose row it is."""
        layout = self.layout
        r_GB, s_G = self._bits(received_1S), self._scales(received_1S)
        own_GB, own_G = self._bits(own_1S), self._scales(own_1S)
        total_G = s_G + own_G
        keep_G = s_G / total_G  # NaN where all are zero or one is NaN: then the bit has no meaning, and is the own one
        random_GB = random_u16(
            self._block_ids(owner),
            layout.format.block,
            seed=self.coding.seed,
            step=self.coding.step,
            stream=merge_stream(self.rank),
        )
        merged_GB = torch.where(offset(random_GB) < keep_G[:, None], r_GB, own_GB)
        layout.codes(own_1S).copy_(pack(merged_GB.view(1, -1), 1))
        self._write_scales(own_1S, total_G)

    def divide(self, row_1S: Tensor, divisor: float) -> None:
        """Make the sums S of a row what the answer's bits are multiplied by."""
        s_G = self._scales(row_1S)
        self._write_scales(row_1S, s_G / torch.full_like(s_G, divisor))

    def _bits(self, row_1S: Tensor) -> Tensor:
        return unpack(self.layout.codes(row_1S), 1).view(-1, self.layout.format.block)

    def _scales(self, row_1S: Tensor) -> Tensor:
        return self.layout.scales(row_1S).clone().view(torch.float32).view(-1)

    def _write_scales(self, row_1S: Tensor, s_G: Tensor) -> None:
        bits_G = magnitude_bits(s_G)
        s_G = as_float(bits_G.masked_fill(bits_G >= 0x7F800000, _NAN))
        self.layout.scales(row_1S).copy_(s_G.view(torch.uint8).view(1, -1))

    def _block_ids(self, owner: int) -> Tensor:
        """Numbers of the blocks in the row of `owner`, which count on from piece to piece."""
        blocks, layout = self.part.blocks, self.layout
        if blocks is not None:
            return blocks.ids_G[owner :: layout.chunks]
        first = self.part.part.start // layout.format.block
        return first + owner + layout.chunks * torch.arange(layout.chunk_blocks, device=self.part.x.device)
