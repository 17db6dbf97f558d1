# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows of a SampleCache in Triton: what is subtracted from a micro-batch, and how it follows, in one reading each.

For rows of plain elements (storage fp32, bf16, fp16); bfloat16 is passed as int16. A program handles BLOCK elements of
one row. Rows stand where `places` says, or one after the other.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.triton_bits import float_bits, from_float, to_float

_BLOCK = 2048


@triton.jit
def _offsets(places, row, first, numel):
    """Where element `first` of a row stands: int64."""
    place = row.to(tl.int64)
    if places is not None:
        place = tl.load(places + row)
    return place * numel + first


@triton.jit(do_not_specialize=["blocks"])
def _difference(x, stored, places, out, numel, blocks, BLOCK: tl.constexpr):
    row, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = first + lane < numel
    here = row.to(tl.int64) * numel + first + lane
    kept = to_float(tl.load(stored + _offsets(places, row, first, numel) + lane, mask=inside, other=0))
    tl.store(out + here, to_float(tl.load(x + here, mask=inside, other=0)) - kept, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _advance(
    stored, places, delta, y, theirs, ids, target, target_places, numel, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    row, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = first + lane < numel
    here = row.to(tl.int64) * numel + first + lane
    kept = tl.full([BLOCK], 0.0, tl.float32)
    if stored is not None:
        kept = to_float(tl.load(stored + _offsets(places, row, first, numel) + lane, mask=inside, other=0))
    new = kept + tl.load(delta + here, mask=inside, other=0.0)
    if theirs is not None:
        new = tl.where(tl.load(theirs + row) == tl.load(ids + row), new, float("nan"))
    if y is not None:
        tl.store(y + here, from_float(new, y.dtype.element_ty), mask=inside)
    rows = tl.where((float_bits(new) & 0x7FFFFFFF) < 0x7F800000, new, kept)
    target_offsets = _offsets(target_places, row, first, numel) + lane
    tl.store(target + target_offsets, from_float(rows, target.dtype.element_ty), mask=inside)


def difference(x_N: Tensor, stored: Tensor, places_R: Tensor | None, out_N: Tensor) -> None:
    """out = x - rows of `stored` (any number, numel)."""
    numel, blocks, rows = _sizes(stored, out_N)
    with _device(out_N):
        _difference[(rows * blocks,)](
            _pointer(x_N), _pointer(stored), places_R, out_N, numel, blocks, BLOCK=_BLOCK, enable_fp_fusion=False
        )


def advance(
    stored: Tensor | None,
    places_R: Tensor | None,
    delta_N: Tensor,
    y_N: Tensor | None,
    theirs_R: Tensor | None,
    ids_R: Tensor,
    target: Tensor,
    target_places_R: Tensor | None,
) -> None:
    """new = rows of `stored` (None: zeros) + delta, to y, and where it is finite to rows of `target`.

    target: any number of rows, where `stored` may be, too; there, what is not finite leaves the old row. A row whose
    number is not `theirs` becomes NaN.
    """
    numel, blocks, rows = _sizes(target, delta_N)
    with _device(delta_N):
        _advance[(rows * blocks,)](
            None if stored is None else _pointer(stored), places_R, delta_N, None if y_N is None else _pointer(y_N),
            theirs_R, ids_R, _pointer(target), target_places_R, numel, blocks, BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def _sizes(stored: Tensor, flat_N: Tensor) -> tuple[int, int, int]:
    numel = stored.shape[1]
    return numel, triton.cdiv(numel, _BLOCK), flat_N.numel() // numel


def _pointer(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _device(x: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
