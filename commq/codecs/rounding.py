"""Rounding: from a scaled number t in [-max_code, max_code] to a code.

Nearest is round half to even. Stochastic rounding takes the code above with a probability equal to the distance
from the code below, using 16 random bits r for each element:  floor(t / ulp + (r + 1/2) * 2**-16).  Codes that are
exactly representable stay as they are; the mean is right to within 2**-17 of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.scales import as_float, magnitude_bits


def _round(t: Tensor, random: Tensor | None) -> Tensor:
    return torch.round(t) if random is None else torch.floor(t + offset(random))


def offset(random: Tensor) -> Tensor:
    """16 random bits as a float32 in (0, 1): (r + 1/2) * 2**-16, exact."""
    return (random.to(torch.float32) + 0.5) * 2.0**-16


def integer_codes(t: Tensor, fmt: Format, random: Tensor | None) -> Tensor:
    """int32 codes in [-max_code, max_code]."""
    return _round(t, random).clamp(-fmt.max_code, fmt.max_code).to(torch.int32)


def sign_codes(t: Tensor, random: Tensor | None) -> Tensor:
    """int32 codes: 1 for +1, 0 for -1. Nearest: t >= 0. Stochastic: +1 with probability (1 + t) / 2."""
    if random is None:
        return (t >= 0).to(torch.int32)
    return torch.floor((t * 0.5 + 0.5) + offset(random)).clamp(0, 1).to(torch.int32)


def level_codes(t: Tensor, fmt: Format, random: Tensor | None) -> Tensor:
    """int32 codes: the nearest level of the table (a tie goes to the one above), or one of the two around t.

    Stochastic: from the level at or below t, up by floor((t - below) / (above - below) + (r + 1/2) * 2**-16).
    """
    levels = level_table(fmt, t.device)
    if random is None:
        edges = (levels[:-1] + levels[1:]) * 0.5
        return torch.searchsorted(edges, t.contiguous(), right=True).to(torch.int32)
    below = torch.searchsorted(levels[1:].contiguous(), t.contiguous(), right=True)
    gap = levels[(below + 1).clamp(max=len(levels) - 1)] - levels[below]
    up = torch.where(gap > 0, (t - levels[below]) / torch.where(gap > 0, gap, 1.0), 0.0)
    return (below + torch.floor(up + offset(random))).clamp(0, len(levels) - 1).to(torch.int32)


def level_table(fmt: Format, device: torch.device) -> Tensor:
    """float32 levels; rounding to float32 happens here."""
    return torch.tensor(fmt.levels, dtype=torch.float32, device=device)


def float_codes(t: Tensor, exponent: int, mantissa: int, top: int, random: Tensor | None) -> Tensor:
    """int32 bit patterns of a small float, saturating at the pattern `top` (which may be infinity's).

    With ulp the spacing of codes around |t| (subnormals included) and k = |t| / ulp rounded to an integer, the
    pattern is ((e - e_min) << mantissa) + k: a carry out of the mantissa steps the exponent by itself.
    """
    bits = magnitude_bits(t)
    e_min = 2 - 2 ** (exponent - 1)
    e = ((bits >> 23) - 127).clamp(min=e_min)
    ulp = as_float((e - mantissa + 127) << 23)
    k = _round(t.abs() / ulp, random).to(torch.int32)
    magnitude = (((e - e_min) << mantissa) + k).clamp(max=top)
    sign = (t.contiguous().view(torch.int32) >> 31) & 1
    return (sign << (exponent + mantissa)) | magnitude


def top_code(fmt: Format) -> int:
    """Bit pattern of max_code in a float format: 0x7E for e4m3, 0x7B for e5m2, 7 for e2m1."""
    exponent = int(fmt.max_code).bit_length() - 1
    lowest = 2 - 2 ** (fmt.exponent - 1)
    return ((exponent - lowest) << fmt.mantissa) + int(fmt.max_code / 2**exponent * 2**fmt.mantissa)


def code_values(codes: Tensor, fmt: Format) -> Tensor:
    """float32 values of unpacked uint8 codes. Patterns that no encoder writes give what their bits say."""
    if fmt.kind == "sign":
        return codes.to(torch.float32) * 2.0 - 1.0
    if fmt.kind == "levels":
        levels = level_table(fmt, codes.device)
        return levels[codes.to(torch.int64).clamp(max=len(levels) - 1)]
    if fmt.kind == "integer":
        shift = 8 - fmt.bits
        return ((codes << shift).view(torch.int8) >> shift).to(torch.float32)
    if fmt.bits == 8:
        dtype = torch.float8_e4m3fn if fmt.mantissa == 3 else torch.float8_e5m2
        return codes.contiguous().view(dtype).to(torch.float32)
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat((e2m1, -e2m1))[codes.to(torch.int64)]
