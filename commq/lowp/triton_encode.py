# mypy: allow-untyped-defs, allow-incomplete-defs
"""Codes of one matrix in both layouts, from one reading: of x_RC along C, and of its transpose along R.

A program handles a piece of the matrix in registers. The scales of whole tensors and rows are given, those of tiles
are found in the piece. Codes and steps are those of `codes.py`, to the bit. bfloat16 is passed as int16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.triton_bits import (
    _maximum,
    bits_float,
    element_offsets,
    float_bits,
    floor_integer,
    max_bits,
    round_even,
    to_float,
)
from commq.codecs.triton_blocks import inverse_of, lift
from commq.lowp.triton_random import load_step

NONE, ONE, ROW, STRIP, SQUARE = 0, 1, 2, 3, 4
"""How scales lie: not wanted; one; one a row; one for each 1 x WIDTH; one for each WIDTH x WIDTH."""
_SCALARS = ["seed", "stream", "stream_t", "stride", "stride_t"]
"""Rows and columns are multiples of 16, and a kernel may know that."""


@triton.jit
def _encode(
    h, codes, steps, amax, rows, columns, first_row, first_column, stride, seed, stream, step_low, step_high,
    MODE: tl.constexpr, KIND: tl.constexpr, MAX: tl.constexpr, INVERSE: tl.constexpr, STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write the codes of h (H, W), which starts at first_row, first_column of an operand, and the steps of its tiles.

    stride: of the steps' first axis.
    """
    r = first_row + tl.arange(0, H)
    c = first_column + tl.arange(0, W)
    if MODE == 1:
        bits = float_bits(tl.load(amax + tl.full([H], 0, tl.int32)))
    elif MODE == 2:
        bits = float_bits(tl.load(amax + r, mask=r < rows, other=0.0))
    elif MODE == 3:
        bits = max_bits(h)
    else:
        bits = tl.full([H], 0, tl.int32) + tl.reduce(max_bits(h), 0, _maximum)
    bits = bits & 0x7FFFFFFF
    marked = bits >= 0x7F800000
    s = bits_float(tl.where(marked, 0, bits))
    up = lift(s)
    t = (h * up[:, None]) * inverse_of(s, up, MAX)[:, None]
    t = tl.where(marked[:, None], 0.0, t)
    if KIND == 0:
        if STOCHASTIC:
            if MODE == 3:
                width = ((columns + WIDTH - 1) // WIDTH) * WIDTH
                element = r.to(tl.int64)[:, None] * width + c[None, :]
            elif MODE == 4:
                tile = (first_row // WIDTH).to(tl.int64) * ((columns + WIDTH - 1) // WIDTH) + first_column // WIDTH
                element = tile * (WIDTH * WIDTH) + (tl.arange(0, H)[:, None] * W + tl.arange(0, W)[None, :])
            else:
                element = r.to(tl.int64)[:, None] * columns + c[None, :]
            code = floor_integer(t + element_offsets(element, seed, stream, step_low, step_high)).to(tl.float32)
        else:
            code = round_even(t)
        code = tl.minimum(tl.maximum(code, -MAX), MAX).to(tl.int8)
    else:
        t = tl.minimum(tl.maximum(t, -MAX), MAX)
        code = (
            t.to(tl.float8e4nv).to(tl.int8, bitcast=True) if KIND == 1 else t.to(tl.float8e5).to(tl.int8, bitcast=True)
        )
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(codes + (r.to(tl.int64)[:, None] * columns + c[None, :]), code, mask=inside)
    step = bits_float(tl.where(marked, 0x7FC00000, float_bits(s * INVERSE)))
    if MODE == 3:
        tl.store(steps + ((first_column // WIDTH).to(tl.int64) * stride + r), step, mask=r < rows)
    elif MODE == 4:
        place = (first_row // WIDTH) * stride + first_column // WIDTH
        tl.store(steps + (place + tl.full([H], 0, tl.int32)), step, mask=tl.arange(0, H) == 0)


@triton.jit(do_not_specialize=_SCALARS)
def _encode_both(
    x, codes, steps, amax, codes_t, steps_t, amax_t, clock, rows, columns, stride, stride_t, seed, stream, stream_t,
    MODE: tl.constexpr, KIND: tl.constexpr, MAX: tl.constexpr, INVERSE: tl.constexpr, STOCHASTIC: tl.constexpr,
    MODE_T: tl.constexpr, KIND_T: tl.constexpr, MAX_T: tl.constexpr, INVERSE_T: tl.constexpr,
    STOCHASTIC_T: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    pieces = (columns + W - 1) // W
    first_row = tl.program_id(0) // pieces * H
    first_column = tl.program_id(0) % pieces * W
    r = first_row + tl.arange(0, H)
    c = first_column + tl.arange(0, W)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    h = to_float(tl.load(x + (r.to(tl.int64)[:, None] * columns + c[None, :]), mask=inside, other=0))
    step_low, step_high = load_step(clock, STOCHASTIC or STOCHASTIC_T)
    if MODE != 0:
        _encode(
            h, codes, steps, amax, rows, columns, first_row, first_column, stride, seed, stream, step_low, step_high,
            MODE, KIND, MAX, INVERSE, STOCHASTIC, WIDTH, H, W,
        )  # fmt: skip
    if MODE_T != 0:
        _encode(
            tl.trans(h), codes_t, steps_t, amax_t, columns, rows, first_column, first_row, stride_t, seed, stream_t,
            step_low, step_high, MODE_T, KIND_T, MAX_T, INVERSE_T, STOCHASTIC_T, WIDTH, W, H,
        )  # fmt: skip


def encode_both(
    x_RC: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    amax: tuple[Tensor, Tensor],
    clock: Tensor,
    modes: tuple[int, int],
    kinds: tuple[int, int],
    stochastic: tuple[bool, bool],
    width: int,
    key: tuple[int, int, int],
) -> None:
    """Write codes and steps of x_RC and codes and steps of its transpose: those whose mode is not NONE.

    x_RC: contiguous, R and C multiples of 16. outputs: codes (any 1-byte dtype, row-major), steps, and both of the
    transpose. kinds: 0 int8, 1 e4m3, 2 e5m2. amax: float32 for modes ONE and ROW. key: seed and both streams.
    """
    rows, columns = x_RC.shape
    codes, steps, codes_t, steps_t = outputs
    tiled = {STRIP, SQUARE} & set(modes)
    height, breadth = (width, width) if SQUARE in modes else (128, 128) if tiled else (128, 64)
    constants: dict[str, int | float | bool] = {}
    for end, mode, kind, sr in zip(("", "_T"), modes, kinds, stochastic, strict=True):
        top = (127.0, 448.0, 57344.0)[kind]
        constants |= {f"MODE{end}": mode, f"KIND{end}": kind, f"MAX{end}": top, f"INVERSE{end}": 1.0 / top}
        constants[f"STOCHASTIC{end}"] = sr
    x = x_RC.view(torch.int16) if x_RC.dtype == torch.bfloat16 else x_RC
    grid = (triton.cdiv(rows, height) * triton.cdiv(columns, breadth),)
    _encode_both[grid](
        x, codes.view(torch.int8), steps, amax[0], codes_t.view(torch.int8), steps_t, amax[1], clock, rows, columns,
        steps.stride(0), steps_t.stride(0), *key, **constants, WIDTH=width, H=height, W=breadth,
        num_warps=max(height * breadth // 1024, 4), enable_fp_fusion=False,
    )  # fmt: skip
