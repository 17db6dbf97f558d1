# mypy: allow-untyped-defs, allow-incomplete-defs
"""Codes of levels in Triton: tables known when a kernel is compiled, and scales that follow the codes.

The arithmetic of `level_codes` in rounding.py and of `normalise` and `fitted_scales` in scales.py. FMT is a TileFormat.
"""

import triton
import triton.language as tl

from commq.codecs.triton_bits import bits_float, float_bits, floor_integer, max_bits, tree_sum

# What tl.sum combines with; used directly, it works compiled and interpreted in one process.
_sum = tl.standard._sum_combine


@triton.jit
def edges_below(t_GB, FMT: tl.constexpr):
    """int32: how many edges between levels are at or below t, which is the code of the nearest level."""
    count: tl.constexpr = FMT.count
    below_GB = (t_GB >= FMT.edges[0]).to(tl.int32)
    for k in tl.static_range(1, count - 1):
        below_GB += (t_GB >= FMT.edges[k]).to(tl.int32)
    return below_GB


@triton.jit
def levels_below(t_GB, FMT: tl.constexpr):
    """int32: how many levels but the first are at or below t, which is the code of the last one that is."""
    count: tl.constexpr = FMT.count
    below_GB = (t_GB >= FMT.levels[1]).to(tl.int32)
    for k in tl.static_range(2, count):
        below_GB += (t_GB >= FMT.levels[k]).to(tl.int32)
    return below_GB


@triton.jit
def level_values(codes_GB, FMT: tl.constexpr):
    """float32 levels of codes; those past the table's end stand for its last level."""
    codes_GB = codes_GB & ((1 << FMT.bits) - 1)
    count: tl.constexpr = FMT.count
    value_GB = tl.where(codes_GB >= 0, FMT.levels[0], 0.0)
    for k in tl.static_range(1, count):
        value_GB = tl.where(codes_GB >= k, FMT.levels[k], value_GB)
    return value_GB


@triton.jit
def level_codes(t_GB, random_GB, FMT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int32 codes of scaled numbers: the nearest level, or one of the two around t."""
    if STOCHASTIC:
        below_GB = levels_below(t_GB, FMT)
        low_GB = level_values(below_GB, FMT)
        step_GB = level_values(tl.minimum(below_GB + 1, FMT.count - 1), FMT) - low_GB
        up_GB = tl.where(step_GB > 0, tl.div_rn(t_GB - low_GB, tl.where(step_GB > 0, step_GB, 1.0)), 0.0)
        return tl.minimum(tl.maximum(below_GB + floor_integer(up_GB + random_GB), 0), FMT.count - 1)
    else:
        return edges_below(t_GB, FMT)


@triton.jit
def quotient_or_zero(over, under):
    """over / under where over > 0, else 0."""
    return tl.where(over > 0, tl.div_rn(over, tl.where(over > 0, under, 1.0)), 0.0)


@triton.jit
def encode_fitted(h_GB, FMT: tl.constexpr, G: tl.constexpr):
    """Codes (G, B), scale patterns (G,) and marks of blocks whose scale is fitted to their codes."""
    bits_G = max_bits(h_GB)
    marked_G = bits_G >= 0x7F800000
    exponent_G = tl.minimum(tl.maximum(tl.where(marked_G, 0, bits_G) >> 23, 1), 253)
    y_GB = tl.where(marked_G[:, None], 0.0, h_GB) * bits_float((254 - exponent_G) << 23)[:, None]
    energy_G = tree_sum(y_GB * y_GB, G, FMT.block)
    some_G = energy_G > 0
    spread_G = tl.full(energy_G.shape, FMT.spread, tl.float32)
    factor_G = tl.where(some_G, tl.sqrt_rn(tl.div_rn(spread_G, tl.where(some_G, energy_G, 1.0))), 0.0)
    codes_GB = edges_below(y_GB * factor_G[:, None], FMT)
    level_GB = level_values(codes_GB, FMT)
    product_G = tree_sum(y_GB * level_GB, G, FMT.block)
    if FMT.fit == "unbiased":
        ratio_G = quotient_or_zero(energy_G, product_G)
    else:
        ratio_G = quotient_or_zero(product_G, tree_sum(level_GB * level_GB, G, FMT.block))
    s_G = tl.minimum(ratio_G * bits_float(exponent_G << 23), 3.4028234663852886e38)
    scale_G = float_bits(s_G)
    if FMT.scale == "fp32":
        scale_G = tl.where(marked_G, 0x7FC00000, scale_G)
    else:
        nearest_G = (scale_G + 0x7FFF + ((scale_G >> 16) & 1)) >> 16
        scale_G = tl.where(marked_G, 0x7FC0, tl.minimum(nearest_G, 0x7F7F))
    return codes_GB, scale_G, marked_G


@triton.jit
def load_threes(pointer, present_G, G: tl.constexpr, B: tl.constexpr):
    """int32 codes (G, B) of 3 bits: eight in three bytes. pointer: uint8, where the first block begins."""
    words: tl.constexpr = B // 8
    offsets = 3 * (tl.arange(0, G)[:, None] * words + tl.arange(0, words)[None, :])
    word = tl.load(pointer + offsets, mask=present_G[:, None], other=0).to(tl.int32)
    word |= tl.load(pointer + offsets + 1, mask=present_G[:, None], other=0).to(tl.int32) << 8
    word |= tl.load(pointer + offsets + 2, mask=present_G[:, None], other=0).to(tl.int32) << 16
    shifts = 3 * tl.arange(0, 8)
    return tl.reshape((word[:, :, None] >> shifts[None, None, :]) & 7, [G, B])


@triton.jit
def store_threes(pointer, codes_GB, present_G, G: tl.constexpr, B: tl.constexpr):
    """Store codes of 3 bits as `load_threes` reads them."""
    words: tl.constexpr = B // 8
    eights = tl.reshape(codes_GB & 7, [G, words, 8]) << (3 * tl.arange(0, 8))[None, None, :]
    word = tl.reduce(eights, 2, _sum)
    offsets = 3 * (tl.arange(0, G)[:, None] * words + tl.arange(0, words)[None, :])
    tl.store(pointer + offsets, (word & 255).to(tl.uint8), mask=present_G[:, None])
    tl.store(pointer + offsets + 1, ((word >> 8) & 255).to(tl.uint8), mask=present_G[:, None])
    tl.store(pointer + offsets + 2, (word >> 16).to(tl.uint8), mask=present_G[:, None])
