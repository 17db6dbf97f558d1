"""One AdamW step of parameters whose moments are codes, in plain torch: the specification.

    m = beta1 m + (1 - beta1) g ;  v = beta2 r**2 + (1 - beta2) g**2 ;  r = sqrt(v)
    x = x (1 - lr weight_decay) - (lr / (1 - beta1**t)) m / (r / sqrt(1 - beta2**t) + eps)

m and r are decoded, used as they are computed, and encoded again. The ROOT of the second moment is stored: elements
whose first moment is too small for its format then also have the smallest root there is, instead of a second moment
that is zero. Every operation is rounded to float32 by itself, so that `triton_adamw` gives the same bits.

Shapes: R rows of C elements (a `Grid`), G blocks of B elements, all rows padded to whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.codecs.philox import random_u16
from commq.codecs.scales import tree_sum
from commq.optim.grid import Grid
from commq.optim.moment_format import MomentFormat, decode, encode


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The scalars of a step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Number of this step, from 1."""

    @property
    def step_size(self) -> float:
        return self.lr / (1.0 - self.beta1**self.step)

    @property
    def inverse_root(self) -> float:
        return 1.0 / math.sqrt(1.0 - self.beta2**self.step)


_TOGETHER = 1 << 22
"""Elements that are computed together, at least one parameter."""


class Moments(NamedTuple):
    """This rank's codes and scales of both moments: uint8 (..., P) and float32 (..., blocks of a row)."""

    first_codes: Tensor
    first_scales: Tensor
    root_codes: Tensor
    root_scales: Tensor


class Rounding(NamedTuple):
    """Where the random bits of bfloat16 parameters come from: philox of (seed, stream), step and element."""

    seed: int
    stream: int
    step: int
    row_numbers: Tensor


class Part(NamedTuple):
    """What is updated of one parameter: this rank's part of it, in place."""

    x: Tensor
    """float32, bfloat16 or float16."""
    grad: Tensor
    """Of the same shape."""
    moments: Moments
    grid: Grid
    factor: Tensor | None = None
    """float32 scalar that the learning rate is multiplied by."""
    rounding: Rounding | None = None
    """Round x, bfloat16, stochastically; otherwise to nearest."""


def update(parts: Sequence[Part], formats: tuple[MomentFormat, MomentFormat], numbers: Numbers) -> None:
    """Change parameters and their moments in place. Blocks of several parameters are computed together."""
    together: list[Part] = []
    numel = 0
    for part in parts:
        if together and numel + part.x.numel() > _TOGETHER:
            _update(together, formats, numbers)
            together, numel = [], 0
        if part.x.numel():
            together.append(part)
            numel += part.x.numel()
    if together:
        _update(together, formats, numbers)


def _update(parts: list[Part], formats: tuple[MomentFormat, MomentFormat], numbers: Numbers) -> None:
    block = formats[0].block
    g_GB = torch.cat([_blocks(part.grad, part.grid, block) for part in parts])
    m_GB = _decode([(each.moments.first_codes, each.moments.first_scales, each.grid) for each in parts], formats[0])
    m_GB = m_GB * numbers.beta1 + g_GB * (1.0 - numbers.beta1)
    r_GB = _decode([(each.moments.root_codes, each.moments.root_scales, each.grid) for each in parts], formats[1])
    r_GB = _root(r_GB, g_GB, numbers)
    x_GB = torch.cat([_blocks(part.x, part.grid, block) for part in parts])
    counts = [part.grid.rows * formats[0].blocks(part.grid.width) for part in parts]
    factors = [part.factor for part in parts]
    factor_G1 = None
    if factors[0] is not None:
        factor_G1 = torch.cat([f.expand(n) for f, n in zip(factors, counts, strict=True) if f is not None])[:, None]
    moved_GB = move(x_GB, m_GB, r_GB, numbers, factor_G1)
    coded = [encode(m_GB, formats[0]), encode(r_GB, formats[1])]
    start = 0
    for part, count in zip(parts, counts, strict=True):
        own = slice(start, start + count)
        _store(part.x, moved_GB[own], part.grid, part.rounding)
        for (codes_GP, scales_G), fmt, codes, scales in zip(
            coded, formats, part.moments[::2], part.moments[1::2], strict=True
        ):
            codes_RP = codes_GP[own].reshape(part.grid.rows, -1)[:, : fmt.code_bytes(part.grid.width)]
            codes.copy_(codes_RP.reshape(codes.shape))
            scales.copy_(scales_G[own].view(scales.shape))
        start += count


def move(x: Tensor, m: Tensor, r: Tensor, numbers: Numbers, factor: Tensor | None) -> Tensor:
    """The last line of the formulas above."""
    if factor is None:
        decay: float | Tensor = 1.0 - numbers.lr * numbers.weight_decay
        step_size: float | Tensor = numbers.step_size
    else:
        decay = 1.0 - factor * (numbers.lr * numbers.weight_decay)
        step_size = factor * numbers.step_size
    return x * decay - (m * step_size) / (r * numbers.inverse_root + numbers.eps)


def excess(
    grad: Tensor, moments: Moments, formats: tuple[MomentFormat, MomentFormat], grid: Grid, numbers: Numbers
) -> Tensor:
    """Sum over this rank's part of g**2 / max(v_hat, eps**2), float32 scalar: what update clipping is by."""
    if grid.rows * grid.width == 0:
        return torch.zeros((), device=grad.device)
    g_GB = _blocks(grad, grid, formats[1].block)
    r_GB = _decode([(moments.root_codes, moments.root_scales, grid)], formats[1])
    r_GB = _root(r_GB, g_GB, numbers)
    return tree_sum(ratio(g_GB, r_GB, numbers)).sum()


def ratio(g: Tensor, r: Tensor, numbers: Numbers) -> Tensor:
    """g**2 / max(v_hat, eps**2)."""
    quotient = g / torch.clamp(r * numbers.inverse_root, min=numbers.eps)
    return quotient * quotient


def round_bfloat16(x_RC: Tensor, grid: Grid, rounding: Rounding) -> Tensor:
    """bfloat16: one of the two neighbours of float32 x, the farther one less often; x on average. Finite stays finite.

    Element c of row n has number n * (width of whole rows, rounded up to 16) + c.
    """
    sixteens = -(-grid.full_width // 16)
    first = grid.first_column // 16
    last = -(-(grid.first_column + grid.width) // 16)
    lanes = torch.arange(first, last, device=x_RC.device)
    ids_G = (rounding.row_numbers[:, None] * sixteens + lanes).reshape(-1)
    random = random_u16(ids_G, 16, seed=rounding.seed, step=rounding.step, stream=rounding.stream)
    start = grid.first_column - 16 * first
    random_RC = random.view(grid.rows, -1)[:, start : start + grid.width]
    bits = x_RC.contiguous().view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    rounded = torch.where(x_RC.isfinite(), (magnitude + random_RC).clamp(max=0x7F7FFFFF), magnitude)
    high = ((rounded >> 16) | ((bits >> 16) & 0x8000)).masked_fill(x_RC.isnan(), 0x7FC0)
    return high.to(torch.int16).view(torch.bfloat16)


def _root(r: Tensor, g: Tensor, numbers: Numbers) -> Tensor:
    v = (r * r) * numbers.beta2 + (g * g) * (1.0 - numbers.beta2)
    return v.double().sqrt().float()  # float32 roots on a CPU are not always rounded correctly


def _decode(coded: Sequence[tuple[Tensor, Tensor, Grid]], fmt: MomentFormat) -> Tensor:
    """float32 (G, B) of all blocks of codes with scales, 0 beyond the end of a row."""
    block_bytes = fmt.block * fmt.bits // 8
    codes_GP = []
    for codes, _, grid in coded:
        codes_RP = codes.reshape(grid.rows, -1)
        padding = fmt.blocks(grid.width) * block_bytes - codes_RP.shape[1]
        codes_GP.append((F.pad(codes_RP, (0, padding)) if padding else codes_RP).reshape(-1, block_bytes))
    x_GB = decode(torch.cat(codes_GP), torch.cat([scales.reshape(-1) for _, scales, _ in coded]), fmt)
    start = 0
    for _, scales, grid in coded:
        if grid.width % fmt.block:
            x_GB[start : start + scales.numel()].view(grid.rows, -1)[:, grid.width :] = 0.0
        start += scales.numel()
    return x_GB


def _blocks(x: Tensor, grid: Grid, block: int) -> Tensor:
    """float32 (G, B) of a tensor; rows are padded with zeros to whole blocks."""
    x_RC = x.reshape(grid.rows, grid.width).to(torch.float32)
    padding = -grid.width % block
    return (F.pad(x_RC, (0, padding)) if padding else x_RC).reshape(-1, block)


def _store(x: Tensor, moved_GB: Tensor, grid: Grid, rounding: Rounding | None) -> None:
    moved_RC = moved_GB.reshape(grid.rows, -1)[:, : grid.width]
    if rounding is not None:
        moved_RC = round_bfloat16(moved_RC, grid, rounding)
    x.copy_(moved_RC.reshape(x.shape))
