# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tiles in Triton: whole blocks, groups and rotated runs of one row of the wire, between memory and registers.

A tile is G blocks of B elements that begin at element `first` of a row. The row is a uint8 pointer; its sections stand
at the byte offsets of `wire.py`. ALIGNED: whether words may be read and written as such, or only byte by byte.
"""

import triton
import triton.language as tl

from commq.codecs.triton_bits import (
    bfloat16_bits,
    bits_float,
    block_offsets,
    element_offsets,
    float_bits,
    load_word,
    pack,
    store_word,
    unpack,
)
from commq.codecs.triton_blocks import decode_codes, decode_scales, encode_blocks
from commq.codecs.triton_levels import load_threes, store_threes
from commq.codecs.triton_spikes import load_spikes, store_spikes


@triton.jit
def _load_raw(row, first, left, FMT: tl.constexpr, ALIGNED: tl.constexpr, G: tl.constexpr):
    """float32 (G, B) of raw elements first, first + 1, ... of a row; 0 from `left` on."""
    offsets = tl.arange(0, G)[:, None] * FMT.block + tl.arange(0, FMT.block)[None, :]
    nbytes: tl.constexpr = FMT.bits // 8
    word = load_word(row + first * nbytes, offsets, offsets < left, nbytes, ALIGNED)
    if FMT.name == "fp32":
        return bits_float(word)
    elif FMT.name == "bf16":
        return bits_float(word << 16)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_codes(pointer, present_G, FMT: tl.constexpr, G: tl.constexpr):
    """int32 codes (G, B) from a uint8 pointer; 0 in blocks that are not present."""
    if FMT.bits == 3:
        codes_GB = load_threes(pointer, present_G, G, FMT.block)
    else:
        per_block: tl.constexpr = FMT.block * FMT.bits // 8
        offsets_GP = tl.arange(0, G)[:, None] * per_block + tl.arange(0, per_block)[None, :]
        packed_GP = tl.load(pointer + offsets_GP, mask=present_G[:, None], other=0)
        codes_GB = unpack(packed_GP, FMT.bits, G, FMT.block)
    return codes_GB


@triton.jit
def store_codes(pointer, codes_GB, present_G, FMT: tl.constexpr, G: tl.constexpr):
    if FMT.bits == 3:
        store_threes(pointer, codes_GB, present_G, G, FMT.block)
    else:
        per_block: tl.constexpr = FMT.block * FMT.bits // 8
        offsets_GP = tl.arange(0, G)[:, None] * per_block + tl.arange(0, per_block)[None, :]
        tl.store(pointer + offsets_GP, pack(codes_GB, FMT.bits, G, FMT.block), mask=present_G[:, None])


@triton.jit
def load_blocks(
    row, first, left, scales_offset, groups_offset, FMT: tl.constexpr, ALIGNED: tl.constexpr, G: tl.constexpr
):
    """Decode elements first, first + 1, ... (a multiple of the tile) of one row: float32 (G, B).

    row: uint8 pointer; left: elements of the row from `first` on, of which the tile is a part.
    """
    if FMT.kind == "raw":
        return _load_raw(row, first, left, FMT, ALIGNED, G)
    elif FMT.kind == "spikes":
        present_G = tl.arange(0, G) * FMT.block < left
        records = row + scales_offset + first // FMT.block * FMT.scale_bytes
        return load_spikes(row + first * FMT.bits // 8, records, present_G, FMT, ALIGNED, G)
    else:
        present_G = tl.arange(0, G) * FMT.block < left
        codes_GB = load_codes(row + first * FMT.bits // 8, present_G, FMT, G)
        scales = row + scales_offset + first // FMT.block * FMT.scale_bytes
        scale_G = load_word(scales, tl.arange(0, G), present_G, FMT.scale_bytes, ALIGNED)
        group_G = tl.full([G], 0.0, tl.float32)
        if FMT.per_group:
            groups = row + groups_offset + first // (FMT.block * FMT.per_group) * 4
            group_G = bits_float(load_word(groups, tl.arange(0, G) // FMT.per_group, present_G, 4, ALIGNED))
        return decode_codes(codes_GB, decode_scales(scale_G, group_G, FMT), FMT)


@triton.jit
def _encode_raw(x, element, seed, stream, step_low, step_high, FMT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Bits of raw elements as int32; a NaN becomes the canonical quiet NaN."""
    bits = float_bits(x)
    magnitude = bits & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    if FMT.name == "fp32":
        word = tl.where(nan, 0x7FC00000, bits)
    elif FMT.name == "fp16":
        half = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        word = tl.where(nan, 0x7E00, half)
    elif STOCHASTIC:
        # The offset in (0, 1) stands for r + 1/2 units of 2**-16: back to the integer r.
        r = (element_offsets(element, seed, stream, step_low, step_high) * 65536.0).to(tl.int32)
        # No overflow: the largest finite magnitude plus r is below 2**31.
        rounded = tl.where(magnitude < 0x7F800000, tl.minimum(magnitude + r, 0x7F7FFFFF), magnitude)
        word = tl.where(nan, 0x7FC0, (rounded >> 16) | ((bits >> 16) & 0x8000))
    else:
        word = bfloat16_bits(x)
    return word


@triton.jit
def _zero_padding(row, start, end):
    """Zero bytes start..end of a row: fewer than 16, between two sections."""
    lane = tl.arange(0, 16)
    tl.store(row + start + lane, tl.full([16], 0, tl.uint8), mask=lane < end - start)


@triton.jit
def store_blocks(
    y_GB, row, row_start, first, tile, tiles, ids, valid, first_block,
    numel, chunk_numel, scales_offset, groups_offset, chunk_bytes, seed, stream, step_low, step_high,
    FMT: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Encode elements first, first + 1, ... of a row and return what they decode to, NaN in marked blocks.

    row: uint8 pointer; row_start: elements before this row, for raw formats' random bits; ids, valid: of this row,
    or None: then its blocks are number first_block, first_block + 1, ... of `numel` elements.
    """
    left = chunk_numel - first
    if FMT.kind == "raw":
        offsets = tl.arange(0, G)[:, None] * FMT.block + tl.arange(0, FMT.block)[None, :]
        element = row_start + first + offsets
        nbytes: tl.constexpr = FMT.bits // 8
        word = _encode_raw(y_GB, element, seed, stream, step_low, step_high, FMT, STOCHASTIC)
        store_word(row + first * nbytes, offsets, word, offsets < left, nbytes, ALIGNED)
        sent_GB = y_GB
        if FMT.name == "bf16":
            sent_GB = bits_float(word << 16)
        elif FMT.name == "fp16":
            sent_GB = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        block = first // FMT.block
        lane_G = tl.arange(0, G)
        present_G = lane_G * FMT.block < left
        if ids is not None:
            ids_G = tl.load(ids + block + lane_G, mask=present_G, other=0)
            valid_G = tl.load(valid + block + lane_G, mask=present_G, other=0)
        else:
            ids_G = first_block + block + lane_G
            valid_G = tl.minimum(tl.maximum(numel - ids_G * FMT.block, 0), FMT.block).to(tl.int32)
        codes = row + first * FMT.bits // 8
        scales = row + scales_offset + block * FMT.scale_bytes
        if FMT.kind == "spikes":
            random_GB = y_GB
            if STOCHASTIC:
                random_GB = block_offsets(ids_G, seed, stream, step_low, step_high, G, FMT.block)
            sent_GB = store_spikes(y_GB, random_GB, codes, scales, present_G, FMT, ALIGNED, STOCHASTIC, G)
        else:
            codes_GB, scale_G, group_G, s_G = encode_blocks(
                y_GB, ids_G, valid_G, seed, stream, step_low, step_high, FMT, STOCHASTIC, G
            )
            sent_GB = decode_codes(codes_GB, s_G, FMT)
            store_codes(codes, codes_GB, present_G, FMT, G)
            store_word(scales, lane_G, scale_G, present_G, FMT.scale_bytes, ALIGNED)
        if FMT.per_group:
            groups = row + groups_offset + block // FMT.per_group * 4
            leader_G = present_G & (lane_G % FMT.per_group == 0)
            store_word(groups, lane_G // FMT.per_group, float_bits(group_G), leader_G, 4, ALIGNED)
        if tile == tiles - 1:
            _zero_padding(row, chunk_numel * FMT.bits // 8, scales_offset)
            scales_end = scales_offset + chunk_numel // FMT.block * FMT.scale_bytes
            if FMT.per_group:
                _zero_padding(row, scales_end, groups_offset)
                groups_end = groups_offset + chunk_numel // (FMT.block * FMT.per_group) * 4
                _zero_padding(row, groups_end, chunk_bytes)
            else:
                _zero_padding(row, scales_end, chunk_bytes)
    return sent_GB
