# mypy: allow-untyped-defs, allow-incomplete-defs
"""`adamw_step` in Triton: one launch a parameter, each byte read and written once, the same bits.

A program has G blocks of B elements. Codes find their level by a binary search in the table of edges, which stays in
the cache. No fused multiply-add, IEEE division and root.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.triton_bits import (
    bits_float,
    element_offsets,
    float_bits,
    from_float,
    max_bits,
    pack,
    to_float,
    tree_sum,
    unpack,
)
from commq.codecs.triton_blocks import lift
from commq.optim.adamw_step import Moments, Numbers, Part, Rounding
from commq.optim.grid import Grid
from commq.optim.moment_format import MomentFormat

_TILE = 1024
_INF: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def _decode(codes, scales, levels, at_GP, inside_GP, block_G, exists_G, BITS: tl.constexpr, SIGNED: tl.constexpr,
            G: tl.constexpr, B: tl.constexpr):  # fmt: skip
    packed_GP = tl.load(codes + at_GP, mask=inside_GP, other=0)
    code_GB = unpack(packed_GP, BITS, G, B)
    s_G = tl.load(scales + block_G, mask=exists_G, other=0.0)
    MAGNITUDE: tl.constexpr = BITS - 1 if SIGNED else BITS
    x_GB = tl.load(levels + (code_GB & ((1 << MAGNITUDE) - 1))) * s_G[:, None]
    if SIGNED:
        x_GB = tl.where((code_GB >> MAGNITUDE) != 0, -x_GB, x_GB)
    return x_GB


@triton.jit
def _encode(x_GB, codes, scales, edges, at_GP, inside_GP, block_G, exists_G, LOWEST: tl.constexpr, BITS: tl.constexpr,
            SIGNED: tl.constexpr, G: tl.constexpr, B: tl.constexpr):  # fmt: skip
    bits_G = max_bits(x_GB)
    marked_G = bits_G >= _INF
    amax_G = bits_float(tl.where(marked_G, 0, bits_G))
    up_G = lift(amax_G)
    lifted_G = tl.where(amax_G > 0, amax_G * up_G, 1.0)
    inverse_G = tl.where(amax_G > 0, tl.div_rn(tl.full(lifted_G.shape, 1.0, tl.float32), lifted_G), 0.0)
    t_GB = (tl.abs(x_GB) * up_G[:, None]) * inverse_G[:, None]
    t_GB = tl.where(marked_G[:, None], 0.0, t_GB)
    MAGNITUDE: tl.constexpr = BITS - 1 if SIGNED else BITS
    code_GB = tl.full([G, B], 0, tl.int32)
    for i in tl.static_range(MAGNITUDE):
        higher_GB = code_GB + (1 << (MAGNITUDE - 1 - i))
        code_GB = tl.where(t_GB >= tl.load(edges + higher_GB - 1), higher_GB, code_GB)
    code_GB = tl.maximum(code_GB, LOWEST)
    if SIGNED:
        code_GB = code_GB | tl.where(x_GB < 0, 1 << MAGNITUDE, 0)
    tl.store(codes + at_GP, pack(code_GB, BITS, G, B), mask=inside_GP)
    s_G = tl.where(marked_G, bits_float(tl.full(bits_G.shape, 0x7FC00000, tl.int32)), amax_G)
    tl.store(scales + block_G, s_G, mask=exists_G)


@triton.jit
def _places(rows, width, code_bytes, blocks, EVEN: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """Where the elements, codes and scales of this program's blocks stand, and which of them exist.

    EVEN: rows of elements and of codes are multiples of 16 long, so 16 bytes can be loaded and stored at a time.
    """
    width, code_bytes = width.to(tl.int64), code_bytes.to(tl.int64)
    if EVEN:
        width, code_bytes = tl.multiple_of(width, 16), tl.multiple_of(code_bytes, 16)
    block_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    exists_G = block_G < rows.to(tl.int64) * blocks
    row_G = block_G // blocks
    first_G = (block_G % blocks).to(tl.int32)
    column_GB = first_G[:, None] * B + tl.arange(0, B)[None, :]
    P: tl.constexpr = B * BITS // 8
    byte_GP = first_G[:, None] * P + tl.arange(0, P)[None, :]
    at_GB = row_G[:, None] * width + column_GB
    at_GP = row_G[:, None] * code_bytes + byte_GP
    inside_GB = exists_G[:, None] & (column_GB < width)
    inside_GP = exists_G[:, None] & (byte_GP < code_bytes)
    return block_G, exists_G, row_G, column_GB, at_GB, at_GP, inside_GB, inside_GP


@triton.jit
def _root(r_GB, g_GB, beta2, gain2):
    return tl.sqrt_rn((r_GB * r_GB) * beta2 + (g_GB * g_GB) * gain2)


@triton.jit
def _stochastic(x_GB, element_GB, seed, stream, step_low, step_high):
    """The int16 of `adamw_step.round_bfloat16`."""
    # element_offsets is (r + 1/2) * 2**-16 of 16 random bits r
    random_GB = (element_offsets(element_GB, seed, stream, step_low, step_high) * 65536.0 - 0.5).to(tl.int32)
    bits_GB = float_bits(x_GB)
    magnitude_GB = bits_GB & 0x7FFFFFFF
    rounded_GB = tl.where(magnitude_GB < _INF, tl.minimum(magnitude_GB + random_GB, 0x7F7FFFFF), magnitude_GB)
    high_GB = (rounded_GB >> 16) | ((bits_GB >> 16) & 0x8000)
    return tl.where(magnitude_GB > _INF, 0x7FC0, high_GB).to(tl.int16)


_SCALARS = [
    "rows", "width", "code_bytes", "blocks", "first_column", "padded_width", "seed", "stream", "step_low", "step_high"
]  # fmt: skip


@triton.jit(do_not_specialize=_SCALARS)
def _update(
    x, grad, m_codes, m_scales, r_codes, r_scales, m_levels, m_edges, r_levels, r_edges, factor, row_numbers,
    rows, width, code_bytes, blocks, first_column, padded_width, seed, stream, step_low, step_high,
    beta1, gain1, beta2, gain2, step_size, inverse_root, eps, decay,
    BITS: tl.constexpr, M_LOWEST: tl.constexpr, R_LOWEST: tl.constexpr, R_SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, CLIPS: tl.constexpr, EVEN: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """decay: the factor of x; where the step is clipped, lr * weight_decay."""
    block_G, exists_G, row_G, column_GB, at_GB, at_GP, inside_GB, inside_GP = _places(
        rows, width, code_bytes, blocks, EVEN, BITS, G, B
    )
    g_GB = to_float(tl.load(grad + at_GB, mask=inside_GB, other=0))
    x_GB = to_float(tl.load(x + at_GB, mask=inside_GB, other=0))
    m_GB = _decode(m_codes, m_scales, m_levels, at_GP, inside_GP, block_G, exists_G, BITS, True, G, B)
    r_GB = _decode(r_codes, r_scales, r_levels, at_GP, inside_GP, block_G, exists_G, BITS, R_SIGNED, G, B)
    r_GB = tl.where(inside_GB, r_GB, 0.0)
    m_GB = m_GB * beta1 + g_GB * gain1
    m_GB = tl.where(inside_GB, m_GB, 0.0)
    r_GB = _root(r_GB, g_GB, beta2, gain2)
    if CLIPS:
        clip = tl.load(factor)
        decay = 1.0 - clip * decay
        step_size = clip * step_size
    x_GB = x_GB * decay - tl.div_rn(m_GB * step_size, r_GB * inverse_root + eps)
    if STOCHASTIC:
        numbers_G = tl.load(row_numbers + row_G, mask=exists_G, other=0)
        element_GB = numbers_G[:, None] * padded_width + (column_GB + first_column)
        tl.store(x + at_GB, _stochastic(x_GB, element_GB, seed, stream, step_low, step_high), mask=inside_GB)
    else:
        tl.store(x + at_GB, from_float(x_GB, x.dtype.element_ty), mask=inside_GB)
    _encode(m_GB, m_codes, m_scales, m_edges, at_GP, inside_GP, block_G, exists_G, M_LOWEST, BITS, True, G, B)
    _encode(r_GB, r_codes, r_scales, r_edges, at_GP, inside_GP, block_G, exists_G, R_LOWEST, BITS, R_SIGNED, G, B)


@triton.jit(do_not_specialize=["rows", "width", "code_bytes", "blocks"])
def _excess(
    grad, r_codes, r_scales, r_levels, sums, rows, width, code_bytes, blocks, beta2, gain2, inverse_root, eps,
    BITS: tl.constexpr, R_SIGNED: tl.constexpr, EVEN: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    block_G, exists_G, _, _, at_GB, at_GP, inside_GB, inside_GP = _places(
        rows, width, code_bytes, blocks, EVEN, BITS, G, B
    )
    g_GB = to_float(tl.load(grad + at_GB, mask=inside_GB, other=0))
    r_GB = _decode(r_codes, r_scales, r_levels, at_GP, inside_GP, block_G, exists_G, BITS, R_SIGNED, G, B)
    r_GB = _root(tl.where(inside_GB, r_GB, 0.0), g_GB, beta2, gain2)
    quotient_GB = tl.div_rn(g_GB, tl.maximum(r_GB * inverse_root, eps))
    tl.store(sums + block_G, tree_sum(quotient_GB * quotient_GB, G, B), mask=exists_G)


def update(parts: Sequence[Part], formats: tuple[MomentFormat, MomentFormat], numbers: Numbers) -> None:
    """See `adamw_step.update`."""
    for part in parts:
        if part.x.numel():
            _update_part(part, formats, numbers)


def _update_part(part: Part, formats: tuple[MomentFormat, MomentFormat], numbers: Numbers) -> None:
    x, grid, factor, rounding = part.x, part.grid, part.factor, part.rounding
    target, source = x.contiguous(), part.grad.contiguous()
    first, root = formats
    (m_levels, m_edges), (r_levels, r_edges) = first.tables(x.device), root.tables(x.device)
    lost = numbers.lr * numbers.weight_decay
    counter = [0, 0, 0, 0] if rounding is None else _counter(rounding)
    with _device(x):
        _update[_programs(grid, first)](
            _pointer(target), _pointer(source), *part.moments, m_levels, m_edges, r_levels, r_edges,
            factor, None if rounding is None else rounding.row_numbers,
            *_sizes(grid, first), grid.first_column, 16 * -(-grid.full_width // 16), *counter,
            numbers.beta1, 1.0 - numbers.beta1, numbers.beta2, 1.0 - numbers.beta2, numbers.step_size,
            numbers.inverse_root, numbers.eps, 1.0 - lost if factor is None else lost,
            M_LOWEST=first.lowest, R_LOWEST=root.lowest, STOCHASTIC=rounding is not None, CLIPS=factor is not None,
            **_constants(grid, formats),
        )  # fmt: skip
    if target is not x:
        x.copy_(target)


def excess(
    grad: Tensor, moments: Moments, formats: tuple[MomentFormat, MomentFormat], grid: Grid, numbers: Numbers
) -> Tensor:
    """See `adamw_step.excess`."""
    root = formats[1]
    sums = torch.zeros(grid.rows * root.blocks(grid.width), device=grad.device)
    if len(sums):
        with _device(grad):
            _excess[_programs(grid, root)](
                _pointer(grad.contiguous()), moments.root_codes, moments.root_scales, root.tables(grad.device)[0], sums,
                *_sizes(grid, root), numbers.beta2, 1.0 - numbers.beta2, numbers.inverse_root, numbers.eps,
                **_constants(grid, formats),
            )  # fmt: skip
    return sums.sum()


def _programs(grid: Grid, fmt: MomentFormat) -> tuple[int]:
    return (triton.cdiv(grid.rows * fmt.blocks(grid.width), max(1, _TILE // fmt.block)),)


def _sizes(grid: Grid, fmt: MomentFormat) -> list[int]:
    return [grid.rows, grid.width, fmt.code_bytes(grid.width), fmt.blocks(grid.width)]


def _constants(grid: Grid, formats: tuple[MomentFormat, MomentFormat]) -> dict[str, Any]:
    first, root = formats
    return {
        "EVEN": grid.width % 16 == 0 and first.code_bytes(grid.width) % 16 == 0,
        "BITS": first.bits,
        "R_SIGNED": root.signed,
        "G": max(1, _TILE // first.block),
        "B": first.block,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def _counter(rounding: Rounding) -> list[int]:
    """seed, stream and the two halves of step, as int32 of the same bits."""
    words = (rounding.seed, rounding.stream, rounding.step, rounding.step >> 32)
    return [(word & 0xFFFFFFFF) - ((word & 0x80000000) << 1) for word in words]


def _pointer(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _device(x: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
