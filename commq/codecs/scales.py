"""Scales: the magnitude of a block, as a few bytes.

Shapes: G blocks of B elements; Q groups of blocks (nvfp4 only). All arithmetic is IEEE float32, one rounding an
operation, so that every implementation gives the same bits. Magnitudes are compared as integers: the bit pattern
of |x| orders finite < infinity < NaN, which a float maximum does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commq.codecs.formats import Format

_INF = 0x7F800000
_BF16_MAX = 0x7F7F
_LIFT = 2.0**64
"""Tiny blocks are multiplied by this (exactly) before any division, so that no inverse overflows."""


def magnitude_bits(x: Tensor) -> Tensor:
    """|x| of float32 as its int32 bit pattern."""
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def as_float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def lift(amax_G: Tensor) -> Tensor:
    """2**64 where a block's largest magnitude is below 2**-64, else 1."""
    return torch.where(amax_G < 1 / _LIFT, _LIFT, 1.0)


def quotient(numerator: float, x: Tensor) -> Tensor:
    """numerator / x, rounded once. (A Python number over a tensor is a reciprocal and a product in torch.)"""
    return torch.full_like(x, numerator) / x


def tree_sum(x_GB: Tensor) -> Tensor:
    """Sum over the last axis (a power of two), adjacent pairs first: ((x0 + x1) + (x2 + x3)) + ...

    The order is part of the specification: a lane that holds neighbours adds them first, then lanes add lanes.
    """
    while x_GB.shape[-1] > 1:
        x_GB = x_GB[..., 0::2] + x_GB[..., 1::2]
    return x_GB[..., 0]


def mean_magnitude(h_GB: Tensor, amax_G: Tensor, valid_G: Tensor) -> Tensor:
    """Mean |h| of each block over its first `valid_G` elements; never overflows, at most amax.

    The others are padding, which is not zero where it was decoded (a sign is never zero) or rotated.
    """
    up = torch.where(amax_G >= _LIFT, 2.0**-16, lift(amax_G))
    down = torch.where(amax_G >= _LIFT, 2.0**16, torch.where(amax_G < 1 / _LIFT, 1 / _LIFT, 1.0))
    padding_GB = torch.arange(h_GB.shape[1], device=h_GB.device) >= valid_G[:, None]
    total = tree_sum((h_GB.abs() * up[:, None]).masked_fill(padding_GB, 0.0))
    return torch.minimum(total / valid_G.clamp(min=1).to(torch.float32) * down, amax_G)


def encode_means(h_GB: Tensor, valid_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (G, B) and scale bytes (G, 4) of signs with two means, and the marks: formats.MEANS.

    Means are over the first valid_G elements of a block, like `mean_magnitude`, rounded to the nearest bfloat16.
    """
    bits_G = magnitude_bits(h_GB).amax(dim=-1)
    marked_G = bits_G >= _INF
    h_GB = h_GB.masked_fill(marked_G[:, None], 0.0)
    amax_G = as_float(bits_G.masked_fill(marked_G, 0))
    up = torch.where(amax_G >= _LIFT, 2.0**-16, lift(amax_G))
    down = torch.where(amax_G >= _LIFT, 2.0**16, torch.where(amax_G < 1 / _LIFT, 1 / _LIFT, 1.0))
    own_GB = torch.arange(h_GB.shape[1], device=h_GB.device) < valid_G[:, None]
    codes_GB = h_GB >= 0
    words = []
    for of_sign_GB, sign_bit in ((codes_GB & own_GB, 0), (~codes_GB & own_GB, 0x8000)):
        total_G = tree_sum((h_GB.abs() * up[:, None]).masked_fill(~of_sign_GB, 0.0))
        mean_G = torch.minimum(total_G / of_sign_GB.sum(dim=-1).clamp(min=1).to(torch.float32) * down, amax_G)
        words.append((bf16_nearest(magnitude_bits(mean_G)) | sign_bit).masked_fill(marked_G, 0x7FC0))
    return codes_GB.to(torch.int32), _bytes(torch.stack(words, dim=-1), torch.int16).view(-1, 4), marked_G


def decode_means(codes_GB: Tensor, scales_G4: Tensor) -> Tensor:
    """float32 (G, B): the mean of its sign for every code."""
    means_G2 = aligned(scales_G4).view(torch.bfloat16).to(torch.float32)
    return torch.where(codes_GB != 0, means_G2[:, :1], means_G2[:, 1:])


def bf16_up(bits: Tensor) -> Tensor:
    """The smallest finite bfloat16 at or above magnitude bits, as its upper 16; the largest one above that."""
    return ((bits + 0xFFFF) >> 16).clamp(max=_BF16_MAX)


def bf16_nearest(bits: Tensor) -> Tensor:
    """The same for the nearest one."""
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).clamp(max=_BF16_MAX)


def _e8m0_up(bits: Tensor, max_code: float) -> Tensor:
    """Biased exponent e + 127 of the smallest 2**e, e >= -127, with amax <= max_code * 2**e.

    Capped so that max_code * 2**e is finite: magnitudes above that (1.75 * 2**127 for e4m3) saturate.
    """
    exponent = int(max_code).bit_length() - 1
    mantissa = int((max_code / 2**exponent - 1) * 2**23)
    return ((bits + (0x7FFFFF - mantissa)) >> 23).sub(exponent).clamp(0, 254 - exponent)


def _e4m3_up(y: Tensor) -> Tensor:
    """Bit pattern of the smallest e4m3 number >= y, for y in [0, 448]."""
    exponent = ((magnitude_bits(y) >> 23) - 127).clamp(min=-6)
    ulp = as_float((exponent - 3 + 127) << 23)
    return (((exponent + 6) << 3) + torch.ceil(y / ulp).to(torch.int32)).clamp(max=0x7E)


def _bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (*, itemsize). Viewed before a dimension is added: torch.compile gives one of length 1 a stride of 0."""
    return values.to(dtype).view(torch.uint8).view(*values.shape, dtype.itemsize)


def encode_scales(
    h_GB: Tensor, valid_G: Tensor, fmt: Format, *, mean: bool, per_group: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale bytes (G, S) and group bytes (Q, 4) of blocks of float32, and the marks (G,) of those not finite.

    mean: take mean |h| instead of the largest |h| (sign with nearest rounding). per_group: blocks of a group.
    A block with a NaN or an infinity gets a NaN scale, and its group's scale ignores it.
    """
    bits_G = magnitude_bits(h_GB).amax(dim=-1)
    marked_G = bits_G >= _INF
    bits_G = bits_G.masked_fill(marked_G, 0)
    amax_G = as_float(bits_G)
    groups_Q4 = h_GB.new_empty((0, 4), dtype=torch.uint8)
    if fmt.scale == "e8m0":
        scales = _bytes(_e8m0_up(bits_G, fmt.max_code).masked_fill(marked_G, 0xFF), torch.uint8)
    elif fmt.scale == "e4m3":
        per_group = per_group or fmt.group // fmt.block
        top_Q = amax_G.unflatten(0, (-1, per_group)).amax(dim=-1)
        up_Q = lift(top_Q)
        inverse_Q = torch.where(top_Q > 0, quotient(448.0, top_Q * up_Q), 0.0)
        up_G, inverse_G = up_Q.repeat_interleave(per_group), inverse_Q.repeat_interleave(per_group)
        y_G = ((amax_G * up_G) * inverse_G).clamp(max=448.0)
        scales = _bytes(_e4m3_up(y_G).masked_fill(marked_G, 0x7F), torch.uint8)
        groups_Q4 = _bytes(top_Q, torch.float32)
    else:
        if mean:
            finite_GB = h_GB.masked_fill(marked_G[:, None], 0.0)
            bits_G = magnitude_bits(mean_magnitude(finite_GB, amax_G, valid_G))
        if fmt.scale == "fp32":
            scales = _bytes(bits_G.masked_fill(marked_G, 0x7FC00000), torch.int32)
        else:
            bf16_G = bf16_nearest(bits_G) if mean else bf16_up(bits_G)
            scales = _bytes(bf16_G.masked_fill(marked_G, 0x7FC0), torch.int16)
    return scales, groups_Q4, marked_G


def normalise(h_GB: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For formats whose scale follows the codes: y (G, B), t (G, B), sum y**2 (G,) and the marks (G,).

    y = h * 2**-k of the block's largest magnitude 2**k (k in [-126, 126]), so that no square over- or underflows, 0 in
    marked blocks; t = y * sqrt((B / spread**2) / sum y**2). All B elements count: what stands in the padding was
    rotated there.
    """
    bits_G = magnitude_bits(h_GB).amax(dim=-1)
    marked_G = bits_G >= _INF
    y_GB = h_GB.masked_fill(marked_G[:, None], 0.0) * as_float((254 - _exponent(bits_G, marked_G)) << 23)[:, None]
    energy_G = tree_sum(y_GB * y_GB)
    numerator = fmt.block * torch.tensor(1 / fmt.spread**2, dtype=torch.float32).item()
    factor_G = torch.where(energy_G > 0, quotient(numerator, energy_G), 0.0).sqrt()
    return y_GB, y_GB * factor_G[:, None], energy_G, marked_G


def fitted_scales(
    h_GB: Tensor, y_GB: Tensor, energy_G: Tensor, marked_G: Tensor, level_GB: Tensor, fmt: Format
) -> Tensor:
    """Scale bytes (G, n) of blocks whose codes stand for `level_GB`: see Format.fit. Nearest fp32 or bf16."""
    product_G = tree_sum(y_GB * level_GB)
    if fmt.fit == "unbiased":
        over_G, under_G = energy_G, product_G
    else:
        over_G, under_G = product_G, tree_sum(level_GB * level_GB)
    ratio_G = torch.where(over_G > 0, over_G / torch.where(over_G > 0, under_G, 1.0), 0.0)
    exponent_G = _exponent(magnitude_bits(h_GB).amax(dim=-1), marked_G)
    s_G = (ratio_G * as_float(exponent_G << 23)).clamp(max=torch.finfo(torch.float32).max)
    bits_G = magnitude_bits(s_G)
    if fmt.scale == "fp32":
        return _bytes(bits_G.masked_fill(marked_G, 0x7FC00000), torch.int32)
    return _bytes(bf16_nearest(bits_G).masked_fill(marked_G, 0x7FC0), torch.int16)


def _exponent(bits_G: Tensor, marked_G: Tensor) -> Tensor:
    """Biased exponent of a magnitude, within [1, 253]: both 2**k and 2**-k are normal numbers."""
    return (bits_G.masked_fill(marked_G, 0) >> 23).clamp(1, 253)


def aligned(x: Tensor) -> Tensor:
    """A copy at an address that any dtype can be viewed at: rows of the wire may start anywhere."""
    return x.clone(memory_format=torch.contiguous_format)


def decode_scales(scales_GS: Tensor, groups_Q4: Tensor, fmt: Format, *, per_group: int | None = None) -> Tensor:
    """The float32 magnitude (G,) that scale bytes stand for: NaN for a marked block, 2**e for e8m0."""
    if fmt.scale == "fp32":
        return aligned(scales_GS).view(torch.float32).squeeze(-1)
    if fmt.scale == "bf16":
        return aligned(scales_GS).view(torch.bfloat16).squeeze(-1).to(torch.float32)
    if fmt.scale == "e8m0":
        e_G = scales_GS.squeeze(-1).to(torch.int32)
        bits_G = torch.where(e_G == 0, 0x00400000, e_G << 23)
        return as_float(torch.where(e_G == 0xFF, 0x7FC00000, bits_G))
    top_G = aligned(groups_Q4).view(torch.float32).squeeze(-1).repeat_interleave(per_group or fmt.group // fmt.block)
    relative_G = aligned(scales_GS).view(torch.float8_e4m3fn).squeeze(-1).to(torch.float32)
    return (relative_G * (1.0 / 448.0)) * top_G
