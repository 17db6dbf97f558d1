# mypy: allow-untyped-defs, allow-incomplete-defs
"""Block arithmetic in Triton: scales and codes of G blocks of B elements, as `scales.py` and `rounding.py` define them.

Everything stays in registers. FMT is a `TileFormat`, known when a kernel is compiled.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from commq.codecs.formats import SCALE_BYTES, Format
from commq.codecs.rounding import level_table, top_code
from commq.codecs.triton_bits import (
    bits_float,
    block_offsets,
    float_bits,
    floor_integer,
    max_bits,
    round_even,
    tree_sum,
)
from commq.codecs.triton_levels import encode_fitted, level_codes, level_values


@dataclass(frozen=True)
class TileFormat:
    """What a kernel must know of a format; every field becomes a constant in its code."""

    name: str
    kind: str
    bits: int
    mantissa: int
    exponent: int
    max_code: float
    inverse: float
    """1 / max_code, or 1 for formats whose scale is a power of two."""
    top: int
    """Pattern of max_code: itself for integers, its bits for floats."""
    max_exponent: int
    """e8m0 only: the exponent of max_code; `max_fraction` is its mantissa field as float32."""
    max_fraction: int
    block: int
    scale: str
    scale_bytes: int
    per_group: int
    """Blocks of a group, or 0."""
    fit: str
    count: int
    """Levels of the table, or 0; `levels` and the `edges` halfway between them are rounded to float32."""
    levels: tuple[float, ...]
    edges: tuple[float, ...]
    spread: float
    """block / spread**2 of the format, or 0."""


@lru_cache(maxsize=256)
def tile_format(fmt: Format) -> TileFormat:
    levels = level_table(fmt, torch.device("cpu"))
    spread = fmt.block * torch.tensor(1 / fmt.spread**2, dtype=torch.float32).item() if fmt.spread else 0.0
    top_bits = (int(fmt.max_code).bit_length() - 1) if fmt.kind != "raw" else 0
    return TileFormat(
        name=fmt.name,
        kind=fmt.kind,
        bits=fmt.bits,
        mantissa=fmt.mantissa,
        exponent=fmt.exponent,
        max_code=fmt.max_code,
        inverse=1.0 if fmt.kind == "raw" or fmt.scale == "e8m0" else 1.0 / fmt.max_code,
        top=top_code(fmt) if fmt.kind == "float" else int(fmt.max_code),
        max_exponent=top_bits,
        max_fraction=int((fmt.max_code / 2**top_bits - 1) * 2**23) if fmt.kind != "raw" else 0,
        block=fmt.block,
        scale=fmt.scale,
        scale_bytes=SCALE_BYTES[fmt.scale],
        per_group=fmt.group // fmt.block,
        fit=fmt.fit,
        count=len(levels),
        levels=tuple(levels.tolist()),
        edges=tuple(((levels[:-1] + levels[1:]) * 0.5).tolist()),
        spread=spread,
    )


@triton.jit
def lift(amax):
    """2**64 below 2**-64, else 1: so that no inverse overflows."""
    return tl.where(amax < 5.421010862427522e-20, 18446744073709551616.0, 1.0)


@triton.jit
def inverse_of(s, up, MAX_CODE: tl.constexpr):
    """max_code / (s * up), or 0 where s is 0."""
    lifted = tl.where(s > 0, s * up, 1.0)
    return tl.where(s > 0, tl.div_rn(tl.full(s.shape, MAX_CODE, tl.float32), lifted), 0.0)


@triton.jit
def mean_bits(h_GB, amax_G, valid_G, G: tl.constexpr, B: tl.constexpr):
    """Bits of the mean |h| over the first valid_G elements; never overflows, at most amax."""
    huge_G = amax_G >= 18446744073709551616.0
    tiny_G = amax_G < 5.421010862427522e-20
    up_G = tl.where(huge_G, 0.0000152587890625, lift(amax_G))
    down_G = tl.where(huge_G, 65536.0, tl.where(tiny_G, 5.421010862427522e-20, 1.0))
    own_GB = tl.arange(0, B)[None, :] < valid_G[:, None]
    total_G = tree_sum(tl.where(own_GB, tl.abs(h_GB) * up_G[:, None], 0.0), G, B)
    mean_G = tl.div_rn(total_G, tl.maximum(valid_G, 1).to(tl.float32)) * down_G
    return float_bits(tl.minimum(mean_G, amax_G))


@triton.jit
def e4m3_up(y):
    """Bit pattern of the smallest e4m3 number >= y, for y in [0, 448]."""
    exponent = tl.maximum((float_bits(y) >> 23) - 127, -6)
    scaled = y * bits_float((3 - exponent + 127) << 23)
    steps = scaled.to(tl.int32)
    steps = tl.where(steps.to(tl.float32) < scaled, steps + 1, steps)
    return tl.minimum(((exponent + 6) << 3) + steps, 0x7E)


@triton.jit
def scale_patterns(bits_G, group_G, marked_G, FMT: tl.constexpr, NEAREST: tl.constexpr):
    """Patterns of the scales of magnitudes, as bits, 0 where marked. group_G: largest of their group, for e4m3 only.

    NEAREST: a bfloat16 is not rounded up.
    """
    if FMT.scale == "e8m0":
        e_G = ((bits_G + (0x7FFFFF - FMT.max_fraction)) >> 23) - FMT.max_exponent
        scale_G = tl.minimum(tl.maximum(e_G, 0), 254 - FMT.max_exponent)
        scale_G = tl.where(marked_G, 0xFF, scale_G)
    elif FMT.scale == "e4m3":
        up_G = lift(group_G)
        y_G = (bits_float(bits_G) * up_G) * inverse_of(group_G, up_G, 448.0)
        scale_G = tl.where(marked_G, 0x7F, e4m3_up(tl.minimum(y_G, 448.0)))
    elif FMT.scale == "fp32":
        scale_G = tl.where(marked_G, 0x7FC00000, bits_G)
    else:
        if NEAREST:
            bf16_G = (bits_G + 0x7FFF + ((bits_G >> 16) & 1)) >> 16
        else:
            bf16_G = (bits_G + 0xFFFF) >> 16
        scale_G = tl.where(marked_G, 0x7FC0, tl.minimum(bf16_G, 0x7F7F))
    return scale_G


@triton.jit
def encode_scales(h_GB, valid_G, FMT: tl.constexpr, MEAN: tl.constexpr, G: tl.constexpr):
    """Scale patterns, group scale of each block (float32) and marks; see scales.encode_scales."""
    bits_G = max_bits(h_GB)
    marked_G = bits_G >= 0x7F800000
    bits_G = tl.where(marked_G, 0, bits_G)
    amax_G = bits_float(bits_G)
    group_G = amax_G
    if FMT.scale == "e4m3":
        shape: tl.constexpr = [G // FMT.per_group, FMT.per_group]
        group_Q = bits_float(max_bits(tl.reshape(amax_G, shape)))
        group_G = tl.reshape(tl.broadcast_to(group_Q[:, None], shape), [G])
    if MEAN:
        bits_G = mean_bits(tl.where(marked_G[:, None], 0.0, h_GB), amax_G, valid_G, G, FMT.block)
    return scale_patterns(bits_G, group_G, marked_G, FMT, MEAN), group_G, marked_G


@triton.jit
def small_float(pattern, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """float32 of a small float's bit pattern (int32), subnormals, infinities and NaNs included."""
    magnitude = pattern & ((1 << (EXPONENT + MANTISSA)) - 1)
    bits = magnitude << (23 - MANTISSA)
    value = float_bits(bits_float(bits) * (2.0 ** (128 - 2 ** (EXPONENT - 1))))
    if EXPONENT == 5:
        value = tl.where(magnitude >= 0x7C, bits | 0x7F800000, value)
    elif EXPONENT == 4:
        value = tl.where(magnitude == 0x7F, 0x7FC00000, value)
    # The sign as a bit: minus would make 0 of -0.
    return bits_float(value | (pattern >> (EXPONENT + MANTISSA)) << 31)


@triton.jit
def decode_scales(scale_G, group_G, FMT: tl.constexpr):
    """The magnitude that a scale pattern stands for: NaN for a marked block, 2**e for e8m0."""
    if FMT.scale == "fp32":
        return bits_float(scale_G)
    elif FMT.scale == "bf16":
        return bits_float(scale_G << 16)
    elif FMT.scale == "e8m0":
        bits_G = tl.where(scale_G == 0, 0x00400000, scale_G << 23)
        return bits_float(tl.where(scale_G == 0xFF, 0x7FC00000, bits_G))
    else:
        return (small_float(scale_G, 4, 3) * (1.0 / 448.0)) * group_G


@triton.jit
def float_codes(t_GB, random_GB, FMT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Bit patterns of a small float, saturating at max_code."""
    bits = float_bits(t_GB)
    e_min: tl.constexpr = 2 - 2 ** (FMT.exponent - 1)
    e = tl.maximum(((bits & 0x7FFFFFFF) >> 23) - 127, e_min)
    scaled = bits_float(bits & 0x7FFFFFFF) * bits_float((FMT.mantissa - e + 127) << 23)
    if STOCHASTIC:
        k = (scaled + random_GB).to(tl.int32)
    else:
        k = round_even(scaled).to(tl.int32)
    magnitude = tl.minimum(((e - e_min) << FMT.mantissa) + k, FMT.top)
    return (((bits >> 31) & 1) << (FMT.exponent + FMT.mantissa)) | magnitude


@triton.jit
def encode_codes(h_GB, s_G, marked_G, random_GB, FMT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int32 codes (G, B): scale, round, clamp."""
    if FMT.scale == "e8m0":
        t_GB = h_GB * tl.div_rn(tl.full(s_G.shape, 1.0, tl.float32), tl.where(marked_G, 1.0, s_G))[:, None]
        zero_G = marked_G
    else:
        up_G = lift(s_G)
        t_GB = (h_GB * up_G[:, None]) * inverse_of(s_G, up_G, FMT.max_code)[:, None]
        zero_G = marked_G | (s_G == 0)
    t_GB = tl.where(zero_G[:, None], 0.0, t_GB)
    if FMT.kind == "levels":
        return level_codes(t_GB, random_GB, FMT, STOCHASTIC)
    elif FMT.kind == "sign":
        if STOCHASTIC:
            return tl.minimum(((t_GB * 0.5 + 0.5) + random_GB).to(tl.int32), 1)
        else:
            return (marked_G[:, None] | (h_GB >= 0)).to(tl.int32)
    elif FMT.kind == "integer" or FMT.kind == "spikes":
        if STOCHASTIC:
            integer_GB = floor_integer(t_GB + random_GB)
        else:
            integer_GB = round_even(t_GB).to(tl.int32)
        return tl.minimum(tl.maximum(integer_GB, -FMT.top), FMT.top)
    else:
        return float_codes(t_GB, random_GB, FMT, STOCHASTIC)


@triton.jit
def decode_codes(codes_GB, s_G, FMT: tl.constexpr):
    """float32 (G, B) of bit patterns (int32, bits above the code ignored) and scales: (code * inverse) * s."""
    if FMT.kind == "levels":
        value_GB = level_values(codes_GB, FMT)
    elif FMT.kind == "sign":
        value_GB = tl.where(codes_GB & 1 != 0, 1.0, -1.0)
    elif FMT.kind == "integer" or FMT.kind == "spikes":
        value_GB = ((codes_GB << (32 - FMT.bits)) >> (32 - FMT.bits)).to(tl.float32)
    else:
        value_GB = small_float(codes_GB, FMT.exponent, FMT.mantissa)
    return (value_GB * FMT.inverse) * s_G[:, None]


@triton.jit
def encode_blocks(
    h_GB, ids_G, valid_G, seed, stream, step_low, step_high, FMT: tl.constexpr, STOCHASTIC: tl.constexpr,
    G: tl.constexpr
):  # fmt: skip
    """Codes (G, B), scale patterns and group scales (G,), and the decoded scales s (G,) with NaN where marked."""
    if FMT.fit != "largest":
        codes_GB, scale_G, marked_G = encode_fitted(h_GB, FMT, G)
        group_G = tl.full([G], 0.0, tl.float32)
        s_G = decode_scales(scale_G, group_G, FMT)
    else:
        mean: tl.constexpr = FMT.kind == "sign" and not STOCHASTIC
        scale_G, group_G, marked_G = encode_scales(h_GB, valid_G, FMT, mean, G)
        s_G = decode_scales(scale_G, group_G, FMT)
        random_GB = h_GB
        if STOCHASTIC:
            random_GB = block_offsets(ids_G, seed, stream, step_low, step_high, G, FMT.block)
        codes_GB = encode_codes(h_GB, s_G, marked_G, random_GB, FMT, STOCHASTIC)
    return codes_GB, scale_G, group_G, s_G
