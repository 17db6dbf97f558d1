"""Quantize one operand and give its values back: exact emulation, in plain torch, with the codecs' arithmetic.

R rows, C columns (the contraction), G tiles of B elements. This is the specification of triton_quantize.py; `values`
(values.py) is one or the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.codecs.reference import decode_blocks, encode_blocks
from commq.codecs.rotation import Rotation, rotate
from commq.lowp.operand import OUTLIER, Operand
from commq.lowp.random import random_bits, random_signs

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Counter:
    """Where the random bits of one operand come from: (seed, stream, step); elements are counted in its tiles."""

    seed: int
    stream: int
    step: Tensor
    """int64, one number."""


def quantized(x_RC: Tensor, operand: Operand, counter: Counter) -> Tensor:
    """The values that the operand's codes stand for: float32 (R, C); raw operands keep their dtype.

    x_RC: float32, bfloat16 or float16, any strides. Error: each tile obeys its format's `error_bound`, with the
    tile's largest number as the scale; a second term divides it by the first's levels. A tile with a NaN or an
    infinity is NaN.
    """
    if operand.is_raw:
        return raw(x_RC, operand)
    h_GB, shape = tiles(x_RC.to(torch.float32), operand.tile)
    random_GB = random_of(h_GB, counter) if operand.rounding == "stochastic" else None
    if operand.second == "none":
        return untiled(_coded(h_GB, operand, random_GB), shape)
    first_GB = _coded(h_GB, operand, None)
    second_GB = _coded(h_GB - first_GB, operand, random_GB)
    if operand.second == "outliers":
        second_GB = torch.where(outliers(h_GB)[:, None], second_GB, 0.0)
    return untiled(first_GB + second_GB, shape)


def raw(x_RC: Tensor, operand: Operand) -> Tensor:
    """A raw operand: the matrix in its dtype."""
    return x_RC.to(_DTYPES[operand.format.name])


def rotated(x_RC: Tensor, rotation: Rotation, counter: Counter) -> Tensor:
    """Runs along the contraction rotated; padded with zeros to whole runs. counter: of the signs."""
    x_RC = F.pad(x_RC.to(torch.float32), (0, -x_RC.shape[1] % rotation.size)).contiguous()
    signs = None
    if rotation.signs:
        signs = random_signs(counter.step.to(x_RC.device), rotation.size, counter.seed, counter.stream)
    return rotate(x_RC.view(-1), rotation, signs).view(x_RC.shape)


def outliers(h_GB: Tensor) -> Tensor:
    """Which tiles (G,) have a largest number above OUTLIER times the geometric mean of all tiles' largest numbers.

    Tiles of zeros do not count. Source: Zhang et al. 2025, "Accurate INT8 training through dynamic block-level
    fallback" (arXiv 2503.08040), where the threshold is adapted between steps instead.
    """
    amax_G = h_GB.abs().amax(dim=-1)
    some_G = (amax_G > 0) & amax_G.isfinite()
    logarithm = torch.where(some_G, amax_G, 1.0).log2()
    mean = logarithm.sum() / some_G.sum().clamp(min=1)
    return amax_G > OUTLIER * mean.exp2()


def _coded(h_GB: Tensor, operand: Operand, random_GB: Tensor | None) -> Tensor:
    tiles, numel = h_GB.shape
    valid_G = torch.full((tiles,), numel, dtype=torch.int32, device=h_GB.device)
    fmt = operand.format
    per_group = tiles if fmt.group else None  # one second scale for the whole tensor
    codes_GB, scales_GS, groups_Q4 = encode_blocks(h_GB, fmt, random_GB, valid_G=valid_G, per_group=per_group)
    codes_GB = (codes_GB & ((1 << fmt.bits) - 1)).to(torch.uint8)
    return decode_blocks(codes_GB, scales_GS, groups_Q4, fmt, per_group=per_group)


def random_of(h_GB: Tensor, counter: Counter) -> Tensor:
    """16 random bits for each element of tiles: int32 (G, B)."""
    clock = counter.step.to(h_GB.device)
    return random_bits(clock, h_GB.numel(), counter.seed, counter.stream).view(h_GB.shape)


def tiles(x_RC: Tensor, tile: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Tiles (G, B) of float32, padded with zeros, and what `untiled` needs to know: R, C and the tile."""
    height, width = x_RC.shape
    rows, columns = tile[0] or max(height, 1), tile[1] or max(width, 1)
    padded = F.pad(x_RC, (0, -width % columns, 0, -height % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    return tiles.reshape(-1, rows * columns), (height, width, rows, columns)


def untiled(h_GB: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    height, width, rows, columns = shape
    tiles = h_GB.view(-(-height // rows), -(-width // columns), rows, columns)
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:height, :width]
