# mypy: allow-untyped-defs, allow-incomplete-defs
"""INT8 GEMMs in Triton: a_RC @ b_SC.T with steps of rows or of tiles, and a second term of tiles with outliers.

Both operands lie along the contraction, as Hopper's INT8 tensor cores need them. Sums of products are int32 within a
tile of the contraction, float32 beyond it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCALARS = ["a_row", "a_tile", "b_row", "b_tile"]
"""R, S and C are multiples of 16, and a kernel may know that."""


@triton.jit
def _place(number, R, S, BR: tl.constexpr, BS: tl.constexpr, GROUP: tl.constexpr):
    """Which piece of the output has this number: neighbours share operands in the cache."""
    across = (S + BS - 1) // BS
    down = (R + BR - 1) // BR
    group = number // (GROUP * across)
    first = group * GROUP
    height = tl.minimum(down - first, GROUP)
    within = number % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def _store(out, value_RS, r, s, R, S, TURNED: tl.constexpr):
    """Write a piece of the product to out (R, S), or to its transpose."""
    inside = (r < R)[:, None] & (s < S)[None, :]
    if TURNED:
        places = s.to(tl.int64)[None, :] * R + r[:, None]
    else:
        places = r.to(tl.int64)[:, None] * S + s[None, :]
    tl.store(out + places, value_RS.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def _rows(
    a, b, out, a_steps, b_steps, R, S, C, a_row, b_row,
    BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Steps of rows (a_row = 1) or of the whole operand (a_row = 0). EVEN: C is a multiple of BC."""
    piece_r, piece_s = _place(tl.program_id(0), R, S, BR, BS, GROUP)
    r = piece_r * BR + tl.arange(0, BR)
    s = piece_s * BS + tl.arange(0, BS)
    c = tl.arange(0, BC)
    # rows beyond the end read row 0: what they give is not stored
    a_pointers = a + (tl.where(r < R, r, 0).to(tl.int64)[:, None] * C + c[None, :])
    b_pointers = b + (tl.where(s < S, s, 0).to(tl.int64)[None, :] * C + c[:, None])
    total = tl.full([BR, BS], 0, tl.int32)
    for start in range(0, C, BC):
        if EVEN:
            a_RC = tl.load(a_pointers)
            b_CS = tl.load(b_pointers)
        else:
            a_RC = tl.load(a_pointers, mask=(start + c < C)[None, :], other=0)
            b_CS = tl.load(b_pointers, mask=(start + c < C)[:, None], other=0)
        total = tl.dot(a_RC, b_CS, total, out_dtype=tl.int32)
        a_pointers += BC
        b_pointers += BC
    a_R = tl.load(a_steps + tl.where(r < R, r, 0) * a_row)
    b_S = tl.load(b_steps + tl.where(s < S, s, 0) * b_row)
    _store(out, total.to(tl.float32) * a_R[:, None] * b_S[None, :], r, s, R, S, False)


@triton.jit(do_not_specialize=_SCALARS)
def _rows_by_descriptor(
    a, b, out, a_steps, b_steps, R, S, C, a_row, b_row,
    BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As `_rows`; a and b are descriptors of pieces (the copy engine of Hopper loads them), each program makes several
    pieces of the output."""
    pieces = ((R + BR - 1) // BR) * ((S + BS - 1) // BS)
    for number in tl.range(tl.program_id(0), pieces, tl.num_programs(0), flatten=True):
        piece_r, piece_s = _place(number, R, S, BR, BS, GROUP)
        total = tl.full([BR, BS], 0, tl.int32)
        for tile in range(0, (C + BC - 1) // BC):
            a_RC = a.load([piece_r * BR, tile * BC])
            b_SC = b.load([piece_s * BS, tile * BC])
            total = tl.dot(a_RC, b_SC.T, total, out_dtype=tl.int32)
        r = piece_r * BR + tl.arange(0, BR)
        s = piece_s * BS + tl.arange(0, BS)
        a_R = tl.load(a_steps + tl.where(r < R, r, 0) * a_row)
        b_S = tl.load(b_steps + tl.where(s < S, s, 0) * b_row)
        _store(out, total.to(tl.float32) * a_R[:, None] * b_S[None, :], r, s, R, S, False)


@triton.jit(do_not_specialize=_SCALARS)
def _tiles(
    a, b, out, a_steps, b_steps, second, second_steps, flags, R, S, C, a_row, a_tile, b_row, b_tile,
    BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
    SIDE: tl.constexpr, SECOND: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Steps of tiles of SIDE rows and BC columns, C a multiple of BC; a_row, a_tile, ...: their strides.

    SECOND: where a tile of a, of BR rows, is flagged, its second term is added. TURNED: out is (S, R).
    """
    piece_r, piece_s = _place(tl.program_id(0), R, S, BR, BS, GROUP)
    r = piece_r * BR + tl.arange(0, BR)
    s = piece_s * BS + tl.arange(0, BS)
    c = tl.arange(0, BC)
    r_in = tl.where(r < R, r, 0)
    s_in = tl.where(s < S, s, 0)
    a_offsets = r_in.to(tl.int64)[:, None] * C + c[None, :]
    b_offsets = s_in.to(tl.int64)[None, :] * C + c[:, None]
    a_places = (r_in // SIDE).to(tl.int64) * a_row
    b_places = (s_in // SIDE).to(tl.int64) * b_row
    total = tl.full([BR, BS], 0, tl.float32)
    for tile in range(0, C // BC):
        a_RC = tl.load(a + a_offsets + tile * BC)
        b_CS = tl.load(b + b_offsets + tile * BC)
        a_R = tl.load(a_steps + a_places + tile * a_tile)
        b_S = tl.load(b_steps + b_places + tile * b_tile)
        product = tl.dot(a_RC, b_CS, out_dtype=tl.int32)
        total += product.to(tl.float32) * (a_R[:, None] * b_S[None, :])
        if SECOND:  # noqa: SIM102 (known when the kernel is compiled)
            if tl.load(flags + piece_r * a_row + tile * a_tile) != 0:
                more_RC = tl.load(second + a_offsets + tile * BC)
                more_R = tl.load(second_steps + a_places + tile * a_tile)
                product = tl.dot(more_RC, b_CS, out_dtype=tl.int32)
                total += product.to(tl.float32) * (more_R[:, None] * b_S[None, :])
    _store(out, total, r, s, R, S, TURNED)


@dataclass(frozen=True)
class Config:
    """How the kernel of rows is cut: rows, columns and contraction of a piece, pieces that share operands in the cache,
    warps and pipeline stages of a program; by descriptors (Hopper and later) or by pointers."""

    rows: int = 128
    columns: int = 256
    contraction: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    descriptors: bool = False


CONFIGS = (
    Config(),
    Config(descriptors=True),
    Config(stages=4, descriptors=True),
    Config(group=16, descriptors=True),
    Config(rows=256, columns=128),
    Config(rows=256, columns=128, descriptors=True),
    Config(columns=128, warps=4),
    Config(columns=128, stages=4),
    Config(columns=128, stages=4, descriptors=True),
)
"""The first is used; bench/gemm.py --parts tune compares them. Sums are exact whichever it is."""


def multiply_rows(
    a_RC: Tensor, b_SC: Tensor, a_steps: Tensor, b_steps: Tensor, out_RS: Tensor, config: Config = CONFIGS[0]
) -> None:
    """out = (a @ b.T) * steps. Steps: float32, one for each row, or one. All sizes are multiples of 16."""
    (rows, contraction), others = a_RC.shape, b_SC.shape[0]
    pieces = triton.cdiv(rows, config.rows) * triton.cdiv(others, config.columns)
    scalars = rows, others, contraction, int(a_steps.numel() > 1), int(b_steps.numel() > 1)
    cut = {"BR": config.rows, "BS": config.columns, "BC": config.contraction, "GROUP": config.group}
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    if config.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(a_RC, [config.rows, config.contraction])
        b = TensorDescriptor.from_tensor(b_SC, [config.columns, config.contraction])
        programs = torch.cuda.get_device_properties(a_RC.device).multi_processor_count if a_RC.is_cuda else 3
        grid = (min(pieces, programs),)
        _rows_by_descriptor[grid](a, b, out_RS, a_steps, b_steps, *scalars, **cut, **launch)
    else:
        even = contraction % config.contraction == 0
        _rows[(pieces,)](a_RC, b_SC, out_RS, a_steps, b_steps, *scalars, **cut, EVEN=even, **launch)


def multiply_tiles(
    a_RC: Tensor,
    b_SC: Tensor,
    a_steps: Tensor,
    b_steps: Tensor,
    out: Tensor,
    side: int,
    *,
    second: tuple[Tensor, Tensor, Tensor] | None = None,
    turned: bool = False,
) -> None:
    """out = sum over tiles of (a @ b.T) * steps; turned: out is the transpose of that.

    Steps: (tiles of rows, tiles of columns) of side x side. second: codes, steps and flags of the second term of a,
    whose tiles are then 128 x 128.
    """
    (rows, contraction), others = a_RC.shape, b_SC.shape[0]
    grid = (triton.cdiv(rows, 128) * triton.cdiv(others, 128),)
    codes, steps, flags = second or (a_RC, a_steps, a_steps)
    _tiles[grid](
        a_RC, b_SC, out, a_steps, b_steps, codes, steps, flags, rows, others, contraction, *a_steps.stride(),
        *b_steps.stride(), BR=128, BS=128, BC=side, GROUP=8, SIDE=side, SECOND=second is not None, TURNED=turned,
        num_warps=8, num_stages=3,
    )  # fmt: skip
