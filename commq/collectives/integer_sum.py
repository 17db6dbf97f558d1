"""Integer sum: codes of all ranks are added as they are, by the library's own all-reduce; nobody decodes in between.

    magnitudes -> all-reduce (MAX) -> encode by the shared scales -> all-reduce of int32 words (SUM) -> decode once

For that the ranks share each block's scale, so a block's codes are levels 0..top of one grid on every rank:

    value = (2 * level / top - 1) * s        int: top = 2 * max_code;  sign: top = 1;  table: top = its last level
    result = (2 * (sum of levels) - W * top) / (top * divisor) * s

A sum of levels is at most W * top, so it fits a field of bit_length(W * top) bits, and as many fields as fit share a
word: no carry leaves a field. Source: IntSGD (Mishchenko et al. 2022), with a scale for each block; lookup tables:
THC (Li et al., NSDI 2024). With integer formats and with tables the result's bits depend on no order of summation.

An element is encoded once, and the library's algorithms (trees, rings in a host, sums in the switch) serve as they
are. What travels is wider: int4 takes 5.3 bits an element at W = 2, 6.4 at W = 4, 8 at W = 16, where two_shot takes 4,
and either a scale for each block, here always fp32. Whatever would take no fewer bytes than the plain elements travels
as it is, as in `plain`; so do raw formats.

Marked blocks: a NaN or an infinity on one rank makes the shared scale NaN, so the block arrives as NaN on all ranks.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from commq.codecs import rounding, scales
from commq.codecs.formats import Format
from commq.codecs.philox import random_u16
from commq.codecs.reference import count_blocks, load_residual, store_residual
from commq.codecs.rotation import rotate, unrotate
from commq.codecs.wire import Layout
from commq.collectives.levels import Fields, Table
from commq.collectives.message import Message, PartOperand, send_stream
from commq.collectives.plain import plain
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Move

_INF, _NAN = 0x7F800000, 0x7FC00000
"""Bit patterns of float32. That of a NaN is the largest of all magnitudes, so it wins a MAX of integers."""


def sent_bytes(numel: int, fmt: Format, world_size: int, *, table: Table | None = None) -> int:
    """Bytes each rank sends for `numel` elements if the library's all-reduce is a ring: words and scales.

    2 (W - 1) / W times 4 bytes a word and 4 a block, against 2 (W - 1) / W times the row of two_shot.
    """
    blocks = -(-numel // fmt.block)
    words = Fields(world_size, _top(fmt, table)).words(blocks * fmt.block)
    return 2 * (world_size - 1) * 4 * (-(-words // world_size) + -(-blocks // world_size))


def integer_sum(message: Message, table: Table | None = None) -> Schedule:
    """All-reduce a piece. With s the shared scale of a block, and plus float32 rounding,

    int, nearest: |result - exact mean| <= s / (2 max_code) where s is the largest |x| of the block on any rank;
    table: s / top times the widest gap between levels (nearest: half of it). stochastic: twice nearest, and unbiased
    within 2**-17 of a step. sign: nearest takes s = the ranks' mean of mean |x|, which a largest |x| would be a very
    poor estimate of, and errs by the mean over ranks of max(|x|, s); stochastic takes the largest |x|, is unbiased,
    and errs by mean |x| + s. That s is a float32 sum in the library's order: its last bit may depend on the piece.
    SUM: W times that. ValueError for formats whose codes do not add up as integers, before anything is sent.
    """
    shares, untouched = [], []
    for part in message.parts:
        share = _Share(part, message.transport.rank, message.transport.world_size, table) if _encodes(part) else None
        if share is not None and share.nbytes < part.x.numel() * part.x.element_size():
            shares.append(share)
        else:
            untouched.append(part.part)
    for shared, op in (("largest", dist.ReduceOp.MAX), ("mean", dist.ReduceOp.SUM)):
        members = [share for share in shares if share.shared == shared]
        totals = yield from _all_reduce(message, [share.magnitudes() for share in members], op)
        for share, total_G in zip(members, totals, strict=True):
            share.agree(total_G)
    sums = yield from _all_reduce(message, [share.encode() for share in shares], dist.ReduceOp.SUM)
    for share, sums_V in zip(shares, sums, strict=True):
        share.decode(sums_V, message.divisor)
    if untouched:
        yield from plain(replace(message, plan=replace(message.plan, parts=tuple(untouched))), narrows=False)


def _all_reduce(
    message: Message, tensors: list[Tensor], op: dist.ReduceOp.RedOpType
) -> Generator[Move, None, list[Tensor]]:
    """All-reduce 1-D tensors of one dtype in one move."""
    if not tensors:
        return []
    total = torch.cat(tensors)
    yield message.transport.all_reduce(total, op)
    return list(total.split([tensor.numel() for tensor in tensors]))


def _encodes(part: PartOperand) -> bool:
    """Whether a part is encoded at all. ValueError if its codes cannot be summed."""
    fmt = part.part.layout.format
    if fmt.kind != "raw" and not fmt.integer_summable:
        raise ValueError(
            f"integer_sum: format {fmt.name!r} has codes that are not evenly spaced, so their sum as integers means "
            "nothing; use int8, int4, int2 or sign, or schedule two_shot"
        )
    return fmt.kind != "raw"


def _top(fmt: Format, table: Table | None) -> int:
    """The highest level of a rank."""
    if table is None:
        return 1 if fmt.kind == "sign" else 2 * int(fmt.max_code)
    if fmt.kind != "integer" or not fmt.bits // 2 < table.index_bits <= fmt.bits:
        raise ValueError(
            f"integer_sum: format {fmt.name!r} with a table of {len(table.levels)} levels; "
            f"expected the integer format that holds an index of {table.index_bits} bits, such as int4 for 16 levels"
        )
    return table.top


class _Share:
    """One rank's share of the sum of one part. G blocks of B elements, rotated and padded."""

    def __init__(self, part: PartOperand, rank: int, world_size: int, table: Table | None) -> None:
        fmt = part.part.layout.format
        self.part, self.table, self.format = part, table, fmt
        self.coding = replace(part.coding, stream=send_stream(rank))
        self.layout = Layout(fmt, part.part.numel, 1, part.part.layout.align)
        self.fields = Fields(world_size, _top(fmt, table))
        self.shared = "mean" if fmt.kind == "sign" and part.coding.rounding == "nearest" else "largest"

    @property
    def nbytes(self) -> int:
        """Bytes that are summed: words and scales."""
        return 4 * (self.fields.words(self.layout.chunk_numel) + self.layout.chunk_blocks)

    def magnitudes(self) -> Tensor:
        """(G,): largest |h| as int32 bits, or mean |h| as float32; NaN for a block that is not finite."""
        self.h_N = self.part.x.to(torch.float32)
        if self.part.residual is not None:
            self.h_N = self.h_N + load_residual(self.part.residual, self.part.residual_scales, self.format.block)
        y_C = torch.nn.functional.pad(self.h_N, (0, self.layout.chunk_numel - self.layout.numel))
        if self.coding.rotation is not None:
            y_C = rotate(y_C, self.coding.rotation, self._signs())
        self.y_GB = y_C.view(-1, self.format.block)
        bits_G = scales.magnitude_bits(self.y_GB).amax(dim=-1)
        marked_G = bits_G >= _INF
        if self.shared == "largest":
            return bits_G.masked_fill(marked_G, _NAN)
        valid_G = count_blocks(self.layout, bits_G.device).valid_G
        finite_GB = self.y_GB.masked_fill(marked_G[:, None], 0.0)
        mean_G = scales.mean_magnitude(finite_GB, scales.as_float(bits_G.masked_fill(marked_G, 0)), valid_G)
        return mean_G.masked_fill(marked_G, torch.nan)

    def agree(self, total_G: Tensor) -> None:
        """Take the shared scale from what the ranks' magnitudes were reduced to."""
        if self.shared == "largest":
            self.s_G = scales.as_float(total_G)
        else:
            s_G = total_G / torch.full_like(total_G, self.fields.world_size)
            self.s_G = torch.where(s_G.isfinite(), s_G, torch.nan)

    def encode(self) -> Tensor:
        """int32 words (V,) of this rank's levels; updates the residual."""
        levels_GB = self._levels()
        if self.part.residual is not None:
            sent_N = self._restored(2 * levels_GB - self.fields.top, self.fields.top)
            update_N = (self.h_N - sent_N) * (1.0 - self.part.decay)
            if self.part.decay:
                e_N = load_residual(self.part.residual, self.part.residual_scales, self.format.block)
                update_N = e_N * self.part.decay + update_N
            store_residual(
                update_N, sent_N.isfinite(), self.part.residual, self.part.residual_scales, self.format.block
            )
        del self.y_GB, self.h_N
        return self.fields.pack(levels_GB.view(-1))

    def decode(self, sums_V: Tensor, divisor: float) -> None:
        """Write the result from the summed words."""
        sums_GB = self.fields.unpack(sums_V, self.layout.chunk_numel).view(-1, self.format.block)
        twice_GB = 2 * sums_GB - self.fields.world_size * self.fields.top
        self.part.out.copy_(self._restored(twice_GB, self.fields.top * divisor))

    def _levels(self) -> Tensor:
        """Integers (G, B) in [0, top]; of no meaning where the scale is NaN."""
        fmt, random_GB = self.format, None
        if self.shared == "mean":
            return rounding.sign_codes(self.y_GB, None)
        if self.coding.rounding == "stochastic":
            blocks = self.part.blocks or count_blocks(self.layout, self.s_G.device)
            ids_G = blocks.ids_G[: self.layout.chunk_blocks]
            random_GB = random_u16(
                ids_G, fmt.block, seed=self.coding.seed, step=self.coding.step, stream=self.coding.stream
            )
        # t = y * (most / s) in [-most, most], as in the codecs; 0 where the block is zero or marked.
        most = fmt.max_code if self.table is None else 1.0
        up_G = scales.lift(self.s_G)
        inverse_G = torch.where(self.s_G > 0, scales.quotient(most, self.s_G * up_G), 0.0)
        t_GB = ((self.y_GB * up_G[:, None]) * inverse_G[:, None]).masked_fill(self.s_G.isnan()[:, None], 0.0)
        if self.table is not None:
            return self.table.round((t_GB + 1.0) * (self.table.top / 2), random_GB)
        if fmt.kind == "sign":
            return rounding.sign_codes(t_GB, random_GB)
        return rounding.integer_codes(t_GB, fmt, random_GB) + int(fmt.max_code)

    def _restored(self, numerator_GB: Tensor, denominator: float) -> Tensor:
        """float32 (N,): numerator / denominator (IEEE) * s, without rotation and padding."""
        numerator_GB = numerator_GB.to(torch.float32)
        y_C = ((numerator_GB / torch.full_like(numerator_GB, denominator)) * self.s_G[:, None]).view(-1)
        if self.coding.rotation is not None:
            y_C = unrotate(y_C, self.coding.rotation, self._signs())
        return y_C[: self.layout.numel]

    def _signs(self) -> Tensor | None:
        rotation = self.coding.rotation
        if rotation is None:
            return None
        return rotation.sign_pattern(seed=self.coding.seed, step=self.coding.step, device=self.part.x.device)
