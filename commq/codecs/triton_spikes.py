# mypy: allow-untyped-defs, allow-incomplete-defs
"""Blocks with kept values in Triton: the arithmetic of spikes.py, and the planes of `wire.pack_planes`.

FMT is a TileFormat of kind "spikes". A block's record is words of four bytes: with bf16x3 two (scale and first value;
second value and places), with fp32x3 four (scale; values; places).
"""

import triton
import triton.language as tl

from commq.codecs.triton_bits import bits_float, float_bits, load_word, max_bits, pack, store_word, unpack
from commq.codecs.triton_blocks import decode_codes, encode_codes

# What tl.max combines with; used directly, it works compiled and interpreted in one process.
_maximum = tl.standard._elementwise_max


@triton.jit
def _take_largest(bits_GB, pattern_GB, random_GB, lane_GB, B: tl.constexpr):
    """Place, pattern and random number (G,) of the first largest magnitude, and magnitudes without it (-1)."""
    top_G = tl.reduce(bits_GB, 1, _maximum)
    place_G = B - 1 - tl.reduce(tl.where(bits_GB == top_G[:, None], B - 1 - lane_GB, -1), 1, _maximum)
    here_GB = lane_GB == place_G[:, None]
    pattern_G = tl.reduce(tl.where(here_GB, pattern_GB, -2147483648), 1, _maximum)
    random_G = tl.reduce(tl.where(here_GB, random_GB, -1), 1, _maximum)
    return place_G, pattern_G, random_G, tl.where(here_GB, -1, bits_GB)


@triton.jit
def _bf16_word(pattern_G, random_G, STOCHASTIC: tl.constexpr):
    """A kept value as 16 bits: the nearest finite bfloat16, or one of the two around it."""
    magnitude_G = pattern_G & 0x7FFFFFFF
    if STOCHASTIC:
        top_G = tl.minimum(magnitude_G + random_G, 0x7F7FFFFF) >> 16
    else:
        top_G = tl.minimum((magnitude_G + (0x7FFF + ((magnitude_G >> 16) & 1))) >> 16, 0x7F7F)
    return top_G | ((pattern_G >> 16) & 0x8000)


@triton.jit
def _put_back(x_GB, lane_GB, first_G, second_G, first_place_G, second_place_G):
    x_GB = tl.where(lane_GB == second_place_G[:, None], second_G[:, None], x_GB)
    return tl.where(lane_GB == first_place_G[:, None], first_G[:, None], x_GB)


@triton.jit
def _store_plane(pointer, codes_GB, present_G, START: tl.constexpr, WIDTH: tl.constexpr, FMT: tl.constexpr,
                 G: tl.constexpr):  # fmt: skip
    per_block: tl.constexpr = FMT.block * FMT.bits // 8
    plane_bytes: tl.constexpr = FMT.block * WIDTH // 8
    offsets_GP = tl.arange(0, G)[:, None] * per_block + tl.arange(0, plane_bytes)[None, :]
    packed_GP = pack(codes_GB >> START, WIDTH, G, FMT.block)
    tl.store(pointer + FMT.block * START // 8 + offsets_GP, packed_GP, mask=present_G[:, None])


@triton.jit
def _load_plane(pointer, present_G, START: tl.constexpr, WIDTH: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr):
    per_block: tl.constexpr = FMT.block * FMT.bits // 8
    plane_bytes: tl.constexpr = FMT.block * WIDTH // 8
    offsets_GP = tl.arange(0, G)[:, None] * per_block + tl.arange(0, plane_bytes)[None, :]
    packed_GP = tl.load(pointer + FMT.block * START // 8 + offsets_GP, mask=present_G[:, None], other=0)
    return unpack(packed_GP, WIDTH, G, FMT.block) << START


@triton.jit
def store_spikes(
    h_GB, random_GB, codes, records, present_G, FMT: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    G: tl.constexpr
):  # fmt: skip
    """Encode blocks at the uint8 pointers `codes` and `records`, and return what they decode to: float32 (G, B).

    random_GB: offsets of stochastic rounding; else anything of that shape.
    """
    lane_GB = tl.broadcast_to(tl.arange(0, FMT.block)[None, :], [G, FMT.block])
    marked_G = max_bits(h_GB) >= 0x7F800000
    h_GB = tl.where(marked_G[:, None], 0.0, h_GB)
    pattern_GB = float_bits(h_GB)
    bits_GB = pattern_GB & 0x7FFFFFFF
    number_GB = bits_GB
    if STOCHASTIC:
        # The offset in (0, 1) stands for r + 1/2 units of 2**-16: back to the integer r.
        number_GB = (random_GB * 65536.0).to(tl.int32)
    place1_G, pattern1_G, number1_G, bits_GB = _take_largest(bits_GB, pattern_GB, number_GB, lane_GB, FMT.block)
    place2_G, pattern2_G, number2_G, bits_GB = _take_largest(bits_GB, pattern_GB, number_GB, lane_GB, FMT.block)
    scale_G = tl.reduce(bits_GB, 1, _maximum)

    lane_G = tl.arange(0, G)
    if FMT.scale == "fp32x3":
        scale_G = tl.where(marked_G, 0x7FC00000, scale_G)
        first_G = tl.where(marked_G, 0x7FC00000, pattern1_G)
        second_G = tl.where(marked_G, 0x7FC00000, pattern2_G)
        store_word(records, lane_G * 4, scale_G, present_G, 4, ALIGNED)
        store_word(records, lane_G * 4 + 1, first_G, present_G, 4, ALIGNED)
        store_word(records, lane_G * 4 + 2, second_G, present_G, 4, ALIGNED)
        store_word(records, lane_G * 4 + 3, place1_G | (place2_G << 8), present_G, 4, ALIGNED)
        s_G, kept1_G, kept2_G = bits_float(scale_G), bits_float(first_G), bits_float(second_G)
    else:
        scale_G = tl.where(marked_G, 0x7FC0, tl.minimum((scale_G + 0xFFFF) >> 16, 0x7F7F))
        first_G = tl.where(marked_G, 0x7FC0, _bf16_word(pattern1_G, number1_G, STOCHASTIC))
        second_G = tl.where(marked_G, 0x7FC0, _bf16_word(pattern2_G, number2_G, STOCHASTIC))
        store_word(records, lane_G * 2, scale_G | (first_G << 16), present_G, 4, ALIGNED)
        places_G = (place1_G << 16) | (place2_G << 24)
        store_word(records, lane_G * 2 + 1, second_G | places_G, present_G, 4, ALIGNED)
        s_G, kept1_G, kept2_G = bits_float(scale_G << 16), bits_float(first_G << 16), bits_float(second_G << 16)

    rest_GB = tl.where(bits_GB < 0, 0.0, h_GB)
    codes_GB = encode_codes(rest_GB, s_G, marked_G, random_GB, FMT, STOCHASTIC)
    if FMT.bits == 8:
        _store_plane(codes, codes_GB, present_G, 0, 8, FMT, G)
    if FMT.bits & 4:
        _store_plane(codes, codes_GB, present_G, 0, 4, FMT, G)
    if FMT.bits & 2:
        _store_plane(codes, codes_GB, present_G, FMT.bits & 4, 2, FMT, G)
    if FMT.bits & 1:
        _store_plane(codes, codes_GB, present_G, FMT.bits & 6, 1, FMT, G)
    return _put_back(decode_codes(codes_GB, s_G, FMT), lane_GB, kept1_G, kept2_G, place1_G, place2_G)


@triton.jit
def load_spikes(codes, records, present_G, FMT: tl.constexpr, ALIGNED: tl.constexpr, G: tl.constexpr):
    """Decode blocks from the uint8 pointers `codes` and `records`: float32 (G, B)."""
    lane_G = tl.arange(0, G)
    if FMT.scale == "fp32x3":
        s_G = bits_float(load_word(records, lane_G * 4, present_G, 4, ALIGNED))
        kept1_G = bits_float(load_word(records, lane_G * 4 + 1, present_G, 4, ALIGNED))
        kept2_G = bits_float(load_word(records, lane_G * 4 + 2, present_G, 4, ALIGNED))
        places_G = load_word(records, lane_G * 4 + 3, present_G, 4, ALIGNED)
    else:
        word_G = load_word(records, lane_G * 2, present_G, 4, ALIGNED)
        places_G = load_word(records, lane_G * 2 + 1, present_G, 4, ALIGNED)
        s_G, kept1_G, kept2_G = bits_float(word_G << 16), bits_float(word_G & -65536), bits_float(places_G << 16)
        places_G = places_G >> 16
    lane_GB = tl.broadcast_to(tl.arange(0, FMT.block)[None, :], [G, FMT.block])
    codes_GB = lane_GB * 0
    if FMT.bits == 8:
        codes_GB = _load_plane(codes, present_G, 0, 8, FMT, G)
    if FMT.bits & 4:
        codes_GB |= _load_plane(codes, present_G, 0, 4, FMT, G)
    if FMT.bits & 2:
        codes_GB |= _load_plane(codes, present_G, FMT.bits & 4, 2, FMT, G)
    if FMT.bits & 1:
        codes_GB |= _load_plane(codes, present_G, FMT.bits & 6, 1, FMT, G)
    x_GB = decode_codes(codes_GB, s_G, FMT)
    return _put_back(x_GB, lane_GB, kept1_G, kept2_G, places_G & 255, (places_G >> 8) & 255)
