"""Error bounds: what a format promises, element by element. The tests hold every implementation to these.

    format          |x - decode(encode(x))| is at most                      a = largest |x| of the block
    int8/4/2        step / 2, step = a / max_code                           (stochastic: step)
    fp8, mxfp8      max(|x| 2**-(m + 1), half the smallest code)            (stochastic: twice that), m mantissa bits
    spike2 to 8     step / 2, with a = the third largest |x|, and for those two |x| 2**-8 (bf16x3) or 0 (fp32x3)
                    (stochastic: step, |x| 2**-7)
    mxfp4, nvfp4    the same with m = 1
    dynamic8, tables  half the widest gap of levels beside x, times a       (stochastic: that gap)
    eden, lloyd     |x| + a / smallest level, where the largest is 1        (their squared error is what is small)
    means           max(|x|, a)
    sign            max(|x|, mean |x| of the block)                         (stochastic: |x| + a)
    bf16, fp16      |x| 2**-8, |x| 2**-11 while x is in the format's range  (stochastic bf16: |x| 2**-7)

plus float32 rounding (some 2**-21 of the step's multiple) and half the smallest subnormal. With a rotation the bound
holds for the 2-norm of each rotated run instead, the transform being orthogonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.spikes import split_spikes

_TINY = 2.0**-148


def error_bound(x_N: Tensor, fmt: Format, *, rounding: str = "nearest") -> Tensor:
    """Bound on |x - decode(encode(x))| as float64 (N,), for finite x_N (float32, 1-D) without rotation."""
    x = x_N.abs().to(torch.float64)
    steps = 0.5 if rounding == "nearest" else 1.0 + 2.0**-16
    if fmt.kind == "raw":
        if fmt.name == "fp32":
            return torch.zeros_like(x)
        smallest = 2.0**-133 if fmt.name == "bf16" else 2.0**-24
        return steps * torch.maximum(x * 2.0**-fmt.mantissa, torch.full_like(x, smallest))
    padded = torch.nn.functional.pad(x, (0, -x.numel() % fmt.unit)).view(-1, fmt.block)
    amax_G = padded.amax(dim=-1)
    if fmt.kind == "means":
        s = amax_G.repeat_interleave(fmt.block)[: x.numel()]
        return torch.maximum(x, s * (1 + 2.0**-8) + 2.0**-133)
    if fmt.kind == "spikes":
        return _spikes_bound(x_N, fmt, steps)
    if fmt.kind == "sign":
        return _sign_bound(x, amax_G, fmt, rounding)
    if fmt.kind == "levels":
        return _levels_bound(x_N, amax_G, fmt, steps)
    s = _largest_scale(amax_G, fmt).repeat_interleave(fmt.block)[: x.numel()]
    slack = 2.0**-21
    if fmt.kind == "integer":
        return s / fmt.max_code * (steps + fmt.max_code * slack) + _TINY
    smallest_code = 2.0 ** (2 - 2 ** (fmt.exponent - 1) - fmt.mantissa)
    step = torch.maximum(x * 2.0**-fmt.mantissa, s / fmt.max_code * smallest_code)
    clipped = x - fmt.max_code * 2.0 ** (127 - math.frexp(fmt.max_code)[1] + 1) if fmt.scale == "e8m0" else x * 0
    return steps * step + (x + s) * slack + _TINY + clipped.clamp(min=0)


def _largest_scale(amax_G: Tensor, fmt: Format) -> Tensor:
    """The largest magnitude the scale of a block can stand for, rounded up by its dtype."""
    if fmt.scale == "bf16":
        return amax_G * (1 + 2.0**-7) + 2.0**-133
    if fmt.scale == "e8m0":
        return torch.maximum(2 * amax_G, torch.full_like(amax_G, fmt.max_code * 2.0**-127))
    if fmt.scale == "e4m3":
        top_G = amax_G.view(-1, fmt.group // fmt.block).amax(dim=-1).repeat_interleave(fmt.group // fmt.block)
        return torch.maximum(amax_G * (1 + 2.0**-3), amax_G + top_G * 2.0**-9 / 448) * (1 + 2.0**-20)
    return amax_G


def _levels_bound(x_N: Tensor, amax_G: Tensor, fmt: Format, steps: float) -> Tensor:
    x = x_N.to(torch.float64)
    if fmt.fit != "largest":
        top = amax_G / min(abs(level) for level in fmt.levels) * (1 + 2.0**-7) + 2.0**-133
        return x.abs() + top.repeat_interleave(fmt.block)[: x.numel()]
    s = _largest_scale(amax_G, fmt).repeat_interleave(fmt.block)[: x.numel()]
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    gaps = torch.nn.functional.pad(levels.diff(), (2, 2), value=0.0)
    gap = gaps.unfold(0, 3, 1).amax(dim=1)  # beside a level, and one farther: the scale may be rounded up
    index = torch.searchsorted(levels, x / torch.where(s > 0, s, 1.0)).clamp(max=len(levels))
    return s * (steps * gap[index] + 2.0**-21) + _TINY


def _spikes_bound(x_N: Tensor, fmt: Format, steps: float) -> Tensor:
    x_GB = torch.nn.functional.pad(x_N, (0, -x_N.numel() % fmt.block)).view(-1, fmt.block)
    places_G2, rest_GB = split_spikes(x_GB)
    s_G1 = rest_GB.abs().amax(dim=-1, keepdim=True).to(torch.float64)
    if fmt.scale == "bf16x3":
        s_G1 = s_G1 * (1 + 2.0**-7) + 2.0**-133
    rest = s_G1 / fmt.max_code * (steps + fmt.max_code * 2.0**-21) + _TINY
    kept_G2 = x_GB.gather(1, places_G2).abs().to(torch.float64)
    kept = kept_G2 * 0 if fmt.scale == "fp32x3" else kept_G2 * (steps * 2.0**-7) + 2.0**-133
    return rest.expand(x_GB.shape).scatter(1, places_G2, kept).reshape(-1)[: x_N.numel()]


def _sign_bound(x: Tensor, amax_G: Tensor, fmt: Format, rounding: str) -> Tensor:
    s_G = amax_G
    if rounding == "nearest":
        ones = torch.nn.functional.pad(torch.ones_like(x), (0, -x.numel() % fmt.block)).view(-1, fmt.block)
        magnitudes = torch.nn.functional.pad(x, (0, -x.numel() % fmt.block)).view(-1, fmt.block)
        s_G = magnitudes.sum(dim=-1) / ones.sum(dim=-1).clamp(min=1)
    s = (s_G * (1 + 2.0**-7)).repeat_interleave(fmt.block)[: x.numel()] + 2.0**-133
    return torch.maximum(x, s) if rounding == "nearest" else x + s
