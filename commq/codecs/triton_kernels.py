# mypy: allow-untyped-defs, allow-incomplete-defs
"""The codec families in Triton, for GPUs without the native library: same signatures, same bytes as `reference.py`.

One program handles a tile of TILE elements of one row: whole blocks, groups and rotated runs, so nothing is shared
between programs and every byte is read and written once. Offsets of a tile are 64-bit, offsets inside it 32-bit.
bfloat16 tensors are passed as int16 (see triton_bits.to_float). TRITON_INTERPRET=1 runs the kernels on CPU tensors.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.reference import Blocks, Coding
from commq.codecs.triton_bits import (
    bits_float,
    float_bits,
    from_float,
    hadamard,
    load_tile,
    max_bits,
    round_even,
    store_tile,
    to_float,
)
from commq.codecs.triton_blocks import TileFormat, inverse_of, lift, tile_format
from commq.codecs.triton_tiles import load_blocks, store_blocks
from commq.codecs.wire import Layout

_TILE = 2048
_SCALARS = ["numel", "chunk_numel", "first_block", "step_low", "step_high", "seed", "stream", "tiles"]


@triton.jit
def _length(chunk_numel, EVEN: tl.constexpr):
    """chunk_numel as int64; EVEN: a multiple of 16, as it always is for block formats."""
    chunk_numel = chunk_numel.to(tl.int64)
    if EVEN:
        chunk_numel = tl.multiple_of(chunk_numel, 16)
    return chunk_numel


@triton.jit
def _int8_residual(e_GB, keep_GB, old_GB):
    """Codes (G, B) of the residual with old ones where it is not kept, new scales (G,), and whether all is kept."""
    e_GB = tl.where(keep_GB, e_GB, 0.0)
    amax_G = bits_float(max_bits(e_GB))
    up_G = lift(amax_G)
    t_GB = (e_GB * up_G[:, None]) * inverse_of(amax_G, up_G, 127.0)[:, None]
    code_GB = tl.minimum(tl.maximum(round_even(t_GB), -127.0), 127.0).to(tl.int8)
    all_kept_G = max_bits(tl.where(keep_GB, 0.0, 1.0)) == 0
    return tl.where(keep_GB, code_GB, old_GB), amax_G, all_kept_G


@triton.jit(do_not_specialize=[*_SCALARS, "num_scales"])
def _encode_bucket(
    x, residual, residual_scales, signs, wire, ids, valid, num_scales, prescale, decay, gain,
    numel, chunk_numel, row_stride, scales_offset, groups_offset, chunk_bytes, tiles,
    seed, stream, step_low, step_high,
    FMT: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    PRESCALE: tl.constexpr, DECAY: tl.constexpr, ROTATION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Reads x and the residual, writes codes, scales and the residual; h, the codes and what they decode to stay in
    registers. HALVES: the powers of two of the rotation and of its inverse.
    """
    G: tl.constexpr = TILE // FMT.block
    program = tl.program_id(0)
    tile = program % tiles
    row_index = (program // tiles).to(tl.int64)
    first = tile.to(tl.int64) * TILE
    chunk_numel = _length(chunk_numel, EVEN)
    numel = numel.to(tl.int64)
    start = row_index * chunk_numel + first
    inside = tl.minimum(numel - start, tl.minimum(chunk_numel - first, TILE)).to(tl.int32)
    offsets_GB = tl.arange(0, G)[:, None] * FMT.block + tl.arange(0, FMT.block)[None, :]

    h_GB = to_float(load_tile(x + start, offsets_GB, inside, TILE))
    if PRESCALE:
        h_GB = h_GB * prescale
    if residual is not None:
        old_GB = load_tile(residual + start, offsets_GB, inside, TILE)
        e_GB = to_float(old_GB)
        if residual_scales is not None:
            block = start // FMT.block
            lane_G = tl.arange(0, G)
            known_G = (lane_G * FMT.block < chunk_numel - first) & (block + lane_G < num_scales)
            scale_G = tl.load(residual_scales + block + lane_G, mask=known_G, other=0.0)
            # Padding stays zero, whatever its block's scale.
            e_GB = tl.where(offsets_GB < inside, (e_GB * (1.0 / 127.0)) * scale_G[:, None], 0.0)
        h_GB = h_GB + e_GB
    y_GB = h_GB
    if ROTATION:
        if signs is not None:
            sign_GB = tl.load(signs + offsets_GB % ROTATION)
            y_GB = y_GB * sign_GB
        y_GB = hadamard(y_GB, ROTATION, G, FMT.block) * HALVES[0]

    row = wire + row_index * row_stride
    row_block = row_index * (chunk_numel // FMT.block)
    row_ids = ids
    row_valid = valid
    if ids is not None:
        row_ids = ids + row_block
        row_valid = valid + row_block
    sent_GB = store_blocks(
        y_GB, row, row_index * chunk_numel, first, tile, tiles, row_ids, row_valid, row_block,
        numel, chunk_numel, scales_offset, groups_offset, chunk_bytes, seed, stream, step_low, step_high,
        FMT, ALIGNED, STOCHASTIC, G,
    )  # fmt: skip
    if residual is not None:
        if ROTATION:
            sent_GB = hadamard(sent_GB, ROTATION, G, FMT.block) * HALVES[1]
            if signs is not None:
                sent_GB = sent_GB * sign_GB
        keep_GB = (float_bits(sent_GB) & 0x7FFFFFFF) < 0x7F800000
        update_GB = (h_GB - sent_GB) * gain
        if DECAY:
            update_GB = e_GB * decay + update_GB
        top: tl.constexpr = 3.3895313892515355e38 if residual.dtype.element_ty == tl.int16 else 3.4028234663852886e38
        update_GB = tl.minimum(tl.maximum(update_GB, -top), top)
        if residual_scales is not None:
            keep_GB = keep_GB | (offsets_GB >= inside)
            update_GB = tl.where(offsets_GB < inside, update_GB, 0.0)
            new_GB, scale_G, all_kept_G = _int8_residual(update_GB, keep_GB, old_GB)
            tl.store(residual_scales + block + lane_G, scale_G, mask=known_G & all_kept_G)
        else:
            new_GB = tl.where(keep_GB, from_float(update_GB, residual.dtype.element_ty), old_GB)
        store_tile(residual + start, offsets_GB, new_GB, inside, TILE)


@triton.jit(do_not_specialize=_SCALARS)
def _decode_bucket(
    wire, out, signs, numel, chunk_numel, row_stride, scales_offset, groups_offset, tiles,
    FMT: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROTATION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Reads codes and scales (and out, to accumulate), writes out."""
    G: tl.constexpr = TILE // FMT.block
    program = tl.program_id(0)
    row_index = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * TILE
    chunk_numel = _length(chunk_numel, EVEN)
    start = row_index * chunk_numel + first
    inside = tl.minimum(numel.to(tl.int64) - start, tl.minimum(chunk_numel - first, TILE)).to(tl.int32)
    offsets_GB = tl.arange(0, G)[:, None] * FMT.block + tl.arange(0, FMT.block)[None, :]

    row = wire + row_index * row_stride
    x_GB = load_blocks(row, first, chunk_numel - first, scales_offset, groups_offset, FMT, ALIGNED, G)
    if ROTATION:
        x_GB = hadamard(x_GB, ROTATION, G, FMT.block) * HALF
        if signs is not None:
            x_GB = x_GB * tl.load(signs + offsets_GB % ROTATION)
    if ACCUMULATE:
        x_GB = to_float(load_tile(out + start, offsets_GB, inside, TILE)) + x_GB
    store_tile(out + start, offsets_GB, from_float(x_GB, out.dtype.element_ty), inside, TILE)


@triton.jit
def _sum_rows(
    wire, row_stride, first, chunk_numel, scales_offset, groups_offset, divisor,
    FMT: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, DIVIDE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The sum over rows, in order, of the elements first, first + 1, ...: float32 (G, B), in registers."""
    left = chunk_numel - first
    total_GB = load_blocks(wire, first, left, scales_offset, groups_offset, FMT, ALIGNED, G)
    row = wire
    for _ in range(1, ROWS):
        row += row_stride
        total_GB += load_blocks(row, first, left, scales_offset, groups_offset, FMT, ALIGNED, G)
    if DIVIDE:
        total_GB = tl.div_rn(total_GB, tl.full(total_GB.shape, 0.0, tl.float32) + divisor)
    return total_GB


@triton.jit(do_not_specialize=_SCALARS)
def _decode_sum(
    wire, out, chunk_numel, row_stride, scales_offset, groups_offset, divisor,
    FMT: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, DIVIDE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Reads the codes and scales of all rows, writes the sum."""
    G: tl.constexpr = TILE // FMT.block
    first = tl.program_id(0).to(tl.int64) * TILE
    chunk_numel = _length(chunk_numel, EVEN)
    total_GB = _sum_rows(
        wire, row_stride, first, chunk_numel, scales_offset, groups_offset, divisor, FMT, ROWS, ALIGNED, DIVIDE, G
    )
    offsets_GB = tl.arange(0, G)[:, None] * FMT.block + tl.arange(0, FMT.block)[None, :]
    inside = tl.minimum(chunk_numel - first, TILE).to(tl.int32)
    store_tile(out + first, offsets_GB, total_GB, inside, TILE)


@triton.jit(do_not_specialize=_SCALARS)
def _decode_sum_encode(
    wire, row_stride, scales_offset, groups_offset, divisor,
    answer, answer_scales_offset, answer_groups_offset, answer_bytes, residual, ids, valid, first_block,
    numel, chunk_numel, tiles, seed, stream, step_low, step_high,
    FMT: tl.constexpr, ANSWER: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    ANSWER_ALIGNED: tl.constexpr, DIVIDE: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Reads the codes and scales of all rows and the residual, writes the answer and the residual; the sum stays in
    registers.
    """
    G: tl.constexpr = TILE // FMT.block
    ANSWER_G: tl.constexpr = TILE // ANSWER.block
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE
    chunk_numel = _length(chunk_numel, EVEN)
    total_GB = _sum_rows(
        wire, row_stride, first, chunk_numel, scales_offset, groups_offset, divisor, FMT, ROWS, ALIGNED, DIVIDE, G
    )
    total_AB = tl.reshape(total_GB, [ANSWER_G, ANSWER.block])
    offsets_AB = tl.arange(0, ANSWER_G)[:, None] * ANSWER.block + tl.arange(0, ANSWER.block)[None, :]
    inside = tl.minimum(chunk_numel - first, TILE).to(tl.int32)
    if residual is not None:
        old_AB = load_tile(residual + first, offsets_AB, inside, TILE)
        total_AB = total_AB + old_AB
    sent_AB = store_blocks(
        total_AB, answer, 0, first, tile, tiles, ids, valid, first_block.to(tl.int64),
        numel.to(tl.int64), chunk_numel, answer_scales_offset, answer_groups_offset, answer_bytes,
        seed, stream, step_low, step_high, ANSWER, ANSWER_ALIGNED, STOCHASTIC, ANSWER_G,
    )  # fmt: skip
    if residual is not None:
        keep_AB = (float_bits(sent_AB) & 0x7FFFFFFF) < 0x7F800000
        update_AB = tl.minimum(tl.maximum(total_AB - sent_AB, -3.4028234663852886e38), 3.4028234663852886e38)
        store_tile(residual + first, offsets_AB, tl.where(keep_AB, update_AB, old_AB), inside, TILE)


def encode_bucket(
    x_N: Tensor,
    wire_WS: Tensor,
    layout: Layout,
    coding: Coding,
    *,
    prescale: float = 1.0,
    residual_N: Tensor | None = None,
    residual_scales_G: Tensor | None = None,
    decay: float = 0.0,
    blocks: Blocks | None = None,
) -> None:
    """See reference.encode_bucket."""
    if layout.chunk_numel == 0:
        return
    rotation = coding.rotation.size if coding.rotation is not None else 0
    fmt, tile = tile_format(layout.format), _tile(layout, rotation)
    tiles = triton.cdiv(layout.chunk_numel, tile)
    with _device(x_N):
        _encode_bucket[(tiles * layout.chunks,)](
            _pointer(x_N), _pointer(residual_N), residual_scales_G, _signs(coding, x_N), wire_WS,
            None if blocks is None else blocks.ids_G, None if blocks is None else blocks.valid_G,
            0 if residual_scales_G is None else residual_scales_G.numel(), float(prescale), float(decay),
            1.0 - decay, layout.numel, layout.chunk_numel, wire_WS.stride(0), layout.scales_offset,
            layout.groups_offset if fmt.per_group else 0, layout.chunk_bytes, tiles, *_counter(coding),
            STOCHASTIC=coding.rounding == "stochastic", PRESCALE=prescale != 1.0, DECAY=decay != 0.0,
            ROTATION=rotation, HALVES=_halves(rotation), **_constants(layout, wire_WS, tile),
        )  # fmt: skip


def decode_bucket(wire_WS: Tensor, layout: Layout, out_N: Tensor, coding: Coding, *, accumulate: bool = False) -> None:
    """See reference.decode_bucket."""
    if layout.numel == 0:
        return
    rotation = coding.rotation.size if coding.rotation is not None else 0
    fmt, tile = tile_format(layout.format), _tile(layout, rotation)
    tiles = triton.cdiv(layout.chunk_numel, tile)
    with _device(out_N):
        _decode_bucket[(tiles * layout.chunks,)](
            wire_WS, _pointer(out_N), _signs(coding, out_N), layout.numel, layout.chunk_numel, wire_WS.stride(0),
            layout.scales_offset, layout.groups_offset if fmt.per_group else 0, tiles,
            ACCUMULATE=accumulate, ROTATION=rotation, HALF=_halves(rotation)[1], **_constants(layout, wire_WS, tile),
        )  # fmt: skip


def decode_sum(wire_KS: Tensor, layout: Layout, *, divisor: float = 1.0) -> Tensor:
    """See reference.decode_sum."""
    total_C = torch.empty(layout.chunk_numel, device=wire_KS.device)
    if layout.chunk_numel == 0:
        return total_C
    fmt, tile = tile_format(layout.format), _tile(layout)
    with _device(wire_KS):
        _decode_sum[(triton.cdiv(layout.chunk_numel, tile),)](
            wire_KS, total_C, layout.chunk_numel, wire_KS.stride(0), layout.scales_offset,
            layout.groups_offset if fmt.per_group else 0, float(divisor),
            ROWS=wire_KS.shape[0], DIVIDE=divisor != 1.0, **_constants(layout, wire_KS, tile),
        )  # fmt: skip
    return total_C


def decode_sum_encode(
    wire_KS: Tensor,
    layout: Layout,
    answer_S: Tensor,
    answer_layout: Layout,
    coding: Coding,
    *,
    chunk: int,
    divisor: float = 1.0,
    residual_C: Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """See reference.decode_sum_encode."""
    if layout.chunk_numel == 0:
        return
    fmt, answer = tile_format(layout.format), tile_format(answer_layout.format)
    tile = max(_tile(layout), _tile(answer_layout))
    tiles = triton.cdiv(layout.chunk_numel, tile)
    if blocks is not None:
        blocks = blocks.chunk(chunk, answer_layout)
    with _device(wire_KS):
        _decode_sum_encode[(tiles,)](
            wire_KS, wire_KS.stride(0), layout.scales_offset,
            layout.groups_offset if fmt.per_group else 0, float(divisor),
            answer_S, answer_layout.scales_offset, answer_layout.groups_offset if answer.per_group else 0,
            answer_layout.chunk_bytes, residual_C, None if blocks is None else blocks.ids_G,
            None if blocks is None else blocks.valid_G, chunk * answer_layout.chunk_blocks,
            layout.numel, layout.chunk_numel, tiles, *_counter(coding),
            ANSWER=answer, ANSWER_ALIGNED=_aligned(answer_S.view(1, -1), answer), DIVIDE=divisor != 1.0,
            ROWS=wire_KS.shape[0], STOCHASTIC=coding.rounding == "stochastic", **_constants(layout, wire_KS, tile),
        )  # fmt: skip


def _tile(layout: Layout, rotation: int = 0) -> int:
    return max(_TILE, layout.format.unit, rotation)


def _constants(layout: Layout, wire: Tensor, tile: int) -> dict[str, Any]:
    """The compile-time arguments that every kernel has, and the options of its compilation."""
    fmt = tile_format(layout.format)
    even = layout.chunk_numel % 16 == 0
    constants = {"FMT": fmt, "TILE": tile, "EVEN": even, "ALIGNED": _aligned(wire, fmt)}
    return {**constants, "num_warps": tile // 512, "enable_fp_fusion": False}


def _pointer(x: Tensor | None) -> Tensor | None:
    return x.view(torch.int16) if x is not None and x.dtype == torch.bfloat16 else x


def _aligned(wire: Tensor, fmt: TileFormat) -> bool:
    """Whether words of codes (raw formats) and of scales stand at multiples of their size."""
    size = fmt.bits // 8 if fmt.kind == "raw" else 4
    return (wire.data_ptr() | (wire.stride(0) if wire.shape[0] > 1 else 0)) % size == 0


def _counter(coding: Coding) -> tuple[int, int, int, int]:
    """seed, stream and the two halves of step, as int32 of the same bits: one kernel for all values."""

    def signed(word: int) -> int:
        word &= 0xFFFFFFFF
        return word - (1 << 32) if word >> 31 else word

    return signed(coding.seed), signed(coding.stream), signed(coding.step), signed(coding.step >> 32)


def _halves(rotation: int) -> tuple[float, float]:
    """The powers of two that follow the transform and its inverse; their product is 1 / rotation."""
    log2 = max(rotation.bit_length() - 1, 0)
    return 0.5 ** (log2 // 2), 0.5 ** (log2 - log2 // 2)


def _signs(coding: Coding, like: Tensor) -> Tensor | None:
    if coding.rotation is None:
        return None
    return coding.rotation.sign_pattern(seed=coding.seed, step=coding.step, device=like.device)


def _device(x: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
