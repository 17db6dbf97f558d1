"""One AdamW step of one parameter whose moments are codes, in plain torch: the specification.

    m = beta1 m + (1 - beta1) g ;  v = beta2 r**2 + (1 - beta2) g**2 ;  r = sqrt(v)
    x = x (1 - lr weight_decay) - (lr / (1 - beta1**t)) m / (r / sqrt(1 - beta2**t) + eps)

m and r are decoded, used as they are computed, and encoded again. The ROOT of the second moment is stored: elements
whose first moment is too small for its format then also have the smallest root there is, instead of a second moment
that is zero. Every operation is rounded to float32 by itself, so that `triton_adamw` gives the same bits.

Shapes: R rows of C elements (a `Grid`), G blocks of B elements, all rows padded to whole blocks.
"""

from __future__ import annotations

import math
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


def update(
    x: Tensor,
    grad: Tensor,
    moments: Moments,
    formats: tuple[MomentFormat, MomentFormat],
    grid: Grid,
    numbers: Numbers,
    *,
    factor: Tensor | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Change this rank's part of a parameter, and its moments, in place.

    x: float32, bfloat16 or float16; grad: of the same shape. factor: float32 scalar that the learning rate is
    multiplied by. rounding: round x, bfloat16, stochastically; otherwise to nearest.
    """
    if x.numel() == 0:
        return
    g_GB = _blocks(grad, grid, formats[0].block)
    m_GB, r_GB = _decoded(moments, formats, grid)
    m_GB = m_GB * numbers.beta1 + g_GB * (1.0 - numbers.beta1)
    r_GB = _root(r_GB, g_GB, numbers)
    moved_GB = move(_blocks(x, grid, formats[0].block), m_GB, r_GB, numbers, factor)
    _store(x, moved_GB, grid, rounding)
    for value_GB, fmt, codes, scales in (
        (m_GB, formats[0], moments.first_codes, moments.first_scales),
        (r_GB, formats[1], moments.root_codes, moments.root_scales),
    ):
        codes_GP, scales_G = encode(value_GB, fmt)
        codes_RP = codes_GP.view(grid.rows, -1)[:, : fmt.code_bytes(grid.width)]
        codes.copy_(codes_RP.reshape(codes.shape))
        scales.copy_(scales_G.view(scales.shape))


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
    codes, scales = moments.root_codes, moments.root_scales
    r_GB = _root(_decode(codes, scales, formats[1], grid), g_GB, numbers)
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


def _decoded(moments: Moments, formats: tuple[MomentFormat, MomentFormat], grid: Grid) -> tuple[Tensor, Tensor]:
    return (
        _decode(moments.first_codes, moments.first_scales, formats[0], grid),
        _decode(moments.root_codes, moments.root_scales, formats[1], grid),
    )


def _decode(codes: Tensor, scales: Tensor, fmt: MomentFormat, grid: Grid) -> Tensor:
    """float32 (G, B), 0 beyond the end of a row."""
    codes_RP = codes.reshape(grid.rows, -1)
    block_bytes = fmt.block * fmt.bits // 8
    padding = fmt.blocks(grid.width) * block_bytes - codes_RP.shape[1]
    x_GB = decode(F.pad(codes_RP, (0, padding)).view(-1, block_bytes), scales.reshape(-1), fmt)
    if grid.width % fmt.block:
        x_GB.view(grid.rows, -1)[:, grid.width :] = 0.0
    return x_GB


def _blocks(x: Tensor, grid: Grid, block: int) -> Tensor:
    """float32 (G, B) of a tensor; rows are padded with zeros to whole blocks."""
    x_RC = x.reshape(grid.rows, grid.width).to(torch.float32)
    return F.pad(x_RC, (0, -grid.width % block)).view(-1, block)


def _store(x: Tensor, moved_GB: Tensor, grid: Grid, rounding: Rounding | None) -> None:
    moved_RC = moved_GB.view(grid.rows, -1)[:, : grid.width]
    if rounding is not None:
        moved_RC = round_bfloat16(moved_RC, grid, rounding)
    x.copy_(moved_RC.reshape(x.shape))
