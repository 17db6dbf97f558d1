"""Codes: operands as a real low-precision GEMM reads them, and which GEMMs there are.

Codes (R, C) of one byte lie along the contraction. A step is what a code counts: the tile's scale / max_code. Steps of
whole operands have shape (1, 1), of rows (R, 1), of 1 x n tiles (C / n, R), of n x n tiles (R / n, C / n rounded up
to a multiple of 4): as cuBLAS wants them. The functions here are plain torch, and the specification of the Triton
kernels; the values that codes and steps stand for are those of `quantized` but for the last bit of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.codecs.reference import decode_blocks, encode_blocks
from commq.codecs.scales import decode_scales
from commq.lowp.gemm import Gemm
from commq.lowp.operand import Operand
from commq.lowp.quantize import Counter, outliers, random_of, tiles, untiled

DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TENSOR, ROW = (0, 0), (1, 0)
ALIGNMENT = 128
"""Tokens are padded with rows of zeros to a multiple of this, so that they can be a contraction."""


@dataclass(frozen=True)
class Codes:
    """One operand: codes (R, C) and steps; with a second term, its codes and steps, and the tiles that have it."""

    codes: Tensor
    steps: Tensor
    second: tuple[Tensor, Tensor, Tensor] | None = None
    """Codes, steps, and flags (R / n, C / n) int32."""


def is_real(gemm: Gemm | None, shape: tuple[int, int, int], capability: tuple[int, int] | None) -> bool:
    """Whether a GPU of this compute capability (None: no GPU) has this GEMM.

    shape: R, S and the contraction C of a_RC @ b_SC.T; 0 where it is the number of tokens, which is padded.
    """
    if gemm is None or gemm.rotation is not None or capability is None:
        return False
    first, second = gemm.first, gemm.second
    names = {first.format.name, second.format.name}
    pair = (first.tile, second.tile)
    plain = first.second == second.second == "none"
    nearest = first.rounding == second.rounding == "nearest"
    scaled = all(operand.format.scale == "fp32" for operand in (first, second))
    if not scaled or any(size % 16 for size in shape):
        return False
    if names <= {"fp8_e4m3", "fp8_e5m2"} and plain and nearest:
        if pair == (TENSOR, TENSOR) and names != {"fp8_e5m2"}:
            return capability >= (8, 9)
        blocks = pair in (((1, 128), (128, 128)), ((1, 128), (1, 128))) and not any(size % 128 for size in shape)
        blocks = blocks and _cuda_version() >= (12, 9)
        return capability == (9, 0) and names == {"fp8_e4m3"} and (pair == (ROW, ROW) or blocks)
    if names == {"int8"} and capability >= (8, 0):
        if set(pair) <= {TENSOR, ROW}:
            return plain
        square = first.tile == second.tile and first.tile in ((32, 32), (128, 128))
        terms = (first.second, second.second)
        one_side = plain or (first.tile == (128, 128) and sorted(terms) == ["none", "outliers"])
        return square and one_side and not any(size % first.tile[0] for size in shape)
    return False


def _cuda_version() -> tuple[int, ...]:
    """Of torch's build; cuBLAS has scales of blocks since 12.9. Without CUDA: one that has everything."""
    return tuple(int(part) for part in (torch.version.cuda or "99.0").split("."))


def encoded(x_RC: Tensor, operand: Operand, counter: Counter) -> Codes:
    """Codes and steps of one operand. x_RC: any strides; R and C multiples of the tile."""
    h_GB, _ = tiles(x_RC.to(torch.float32), operand.tile)
    random_GB = random_of(h_GB, counter) if operand.rounding == "stochastic" else None
    if operand.second == "none":
        return Codes(*_term(h_GB, x_RC, operand, random_GB)[:2])
    codes, steps, value_GB = _term(h_GB, x_RC, operand, None)
    more_codes, more_steps, _ = _term(h_GB - value_GB, x_RC, operand, random_GB)
    flags = _laid(outliers(h_GB).to(torch.int32), x_RC, operand.tile)
    return Codes(codes, steps, (more_codes, more_steps, flags))


def _term(h_GB: Tensor, x_RC: Tensor, operand: Operand, random_GB: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (R, C), steps and the values (G, B) of one term."""
    fmt = operand.format
    valid_G = torch.full((len(h_GB),), h_GB.shape[1], dtype=torch.int32, device=h_GB.device)
    codes_GB, scales_GS, groups_Q4 = encode_blocks(h_GB, fmt, random_GB, valid_G=valid_G)
    step_G = decode_scales(scales_GS, groups_Q4, fmt) * (1.0 / fmt.max_code)
    bytes_GB = (codes_GB & 0xFF).to(torch.uint8)
    _, shape = tiles(x_RC, operand.tile)
    codes = untiled(bytes_GB, shape).contiguous().view(DTYPES[fmt.name])
    return codes, _laid(step_G, x_RC, operand.tile), decode_blocks(bytes_GB, scales_GS, groups_Q4, fmt)


def _laid(step_G: Tensor, x_RC: Tensor, tile: tuple[int, int]) -> Tensor:
    """Numbers of tiles as the shape of steps asks."""
    if tile in (TENSOR, ROW):
        return step_G.view(-1, 1)
    steps = step_G.view(-(-x_RC.shape[0] // tile[0]), -1)
    return steps.T.contiguous() if tile[0] == 1 else F.pad(steps, (0, -steps.shape[1] % 4))


def multiplied(a: Codes, b: Codes, gemm: Gemm) -> Tensor:
    """float32 a @ b.T of codes and steps in plain torch: what a real GEMM gives but for the order of its sums."""
    return _values(a, gemm.first) @ _values(b, gemm.second).T


def _values(operand_codes: Codes, operand: Operand) -> Tensor:
    values = operand_codes.codes.to(torch.float32) * _spread(operand_codes.steps, operand_codes.codes, operand.tile)
    if operand_codes.second is not None:
        codes, steps, flags = operand_codes.second
        more = codes.to(torch.float32) * _spread(steps, codes, operand.tile)
        values = values + torch.where(_spread(flags, codes, operand.tile) != 0, more, 0.0)
    return values


def _spread(steps: Tensor, codes_RC: Tensor, tile: tuple[int, int]) -> Tensor:
    """Steps (or flags) for each element."""
    if tile in (TENSOR, ROW):
        return steps
    rows, columns = tile
    steps = steps.T if rows == 1 else steps[:, : codes_RC.shape[1] // columns]
    return steps.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
