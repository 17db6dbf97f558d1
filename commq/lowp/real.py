"""Real low-precision GEMMs: operators that compiled graphs hold as they are.

    lowp_encode     codes and steps of a matrix, and of its transpose, from one reading
    lowp_multiply   a_RC @ b_SC.T of codes and steps

FP8 GEMMs are torch's scaled_mm, INT8 ones Triton kernels, as is the encoding. On a CPU both are the plain torch of
`codes.py`. Error against `emulated` with the same operands: 2**-8 |y| (y is rounded to bfloat16) + 2**-10 sum |a b| +
2**-8 max |a b|: tensor cores add 32 FP8 products at a time with 13 bits below the largest one's exponent, and so to
what they have (INT8 has the first part only, and the last bits of float32).
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.lowp import codes as plain
from commq.lowp.codes import DTYPES, ROW, TENSOR, Codes
from commq.lowp.gemm import Gemm
from commq.lowp.gemm import gemm as read_gemm
from commq.lowp.operand import Operand, operand
from commq.lowp.quantize import Counter

_EMPTY = (0,)
_operand, _gemm = cache(operand), cache(read_gemm)


def _triton(name: str, tensor: Tensor) -> ModuleType | None:
    """A module of Triton kernels, on a GPU."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return importlib.import_module(f"commq.lowp.triton_{name}")
    return None


def encode(
    x_RC: Tensor, along: Operand | None, across: Operand | None, counters: tuple[Counter, Counter]
) -> tuple[Codes | None, Codes | None]:
    """Codes of x_RC, as `along` says, and of its transpose, as `across` says; None where they are None.

    x_RC: contiguous. Largest numbers of tensors and rows are found outside of the operator, where a compiler can do it
    together with what made x.
    """
    if any(each is not None and each.second != "none" for each in (along, across)):
        first = plain.encoded(x_RC, along, counters[0]) if along is not None else None
        return first, plain.encoded(x_RC.T, across, counters[1]) if across is not None else None
    sides = {each.tile[1] for each in (along, across) if each is not None and each.tile not in (TENSOR, ROW)}
    if len(sides) > 1:  # the kernel knows one length of tiles
        return encode(x_RC, along, None, counters)[0], encode(x_RC, None, across, counters)[1]
    empty = torch.empty(_EMPTY, device=x_RC.device)
    amax = empty if along is None else _largest(x_RC, along, 1, empty)
    amax_t = empty if across is None else _largest(x_RC, across, 0, empty)
    codes, steps, codes_t, steps_t = torch.ops.commq.lowp_encode(
        x_RC, amax, amax_t, counters[0].step.to(x_RC.device), _text(along), _text(across),
        [counters[0].seed, counters[0].stream, counters[1].stream],
    )  # fmt: skip
    return (Codes(codes, steps) if along is not None else None, Codes(codes_t, steps_t) if across is not None else None)


def multiply(a: Codes, b: Codes, gemm: Gemm, dtype: torch.dtype) -> Tensor:
    """a @ b.T in `dtype`, (R, S)."""
    second = [] if a.second is None and b.second is None else [*(a.second or b.second or ())]
    return torch.ops.commq.lowp_multiply(a.codes, b.codes, a.steps, b.steps, second, str(gemm), dtype)


def _text(operand: Operand | None) -> str:
    return "" if operand is None else str(operand)


def _largest(x_RC: Tensor, operand: Operand, axis: int, empty: Tensor) -> Tensor:
    """Largest |x| of the whole, or for each index of the axis that is not `axis`; NaN if there is one: float32."""
    if operand.tile == TENSOR:  # rows first: a compiler fuses that with a norm or an activation before it
        return torch.linalg.vector_norm(x_RC, torch.inf, dim=1).amax().to(torch.float32).view(1)
    return torch.linalg.vector_norm(x_RC, torch.inf, dim=axis).to(torch.float32) if operand.tile == ROW else empty


def _outputs(x_RC: Tensor, what: Operand | None) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and steps of x_RC."""
    if what is None:
        return x_RC.new_empty(_EMPTY, dtype=torch.int8), x_RC.new_empty(_EMPTY, dtype=torch.float32)
    rows, columns = x_RC.shape
    high, wide = what.tile
    if what.tile in (TENSOR, ROW):
        shape = (rows if what.tile == ROW else 1, 1)
    else:
        tiles = -(-columns // wide)
        shape = (tiles, rows) if high == 1 else (-(-rows // high), -(-tiles // 4) * 4)
    codes = x_RC.new_empty((rows, columns), dtype=DTYPES[what.format.name])
    return codes, x_RC.new_zeros(shape, dtype=torch.float32)


@torch.library.custom_op("commq::lowp_encode", mutates_args=())
def _lowp_encode(
    x: Tensor, amax: Tensor, amax_t: Tensor, clock: Tensor, along: str, across: str, key: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = (_operand(text) if text else None for text in (along, across))
    kernels = _triton("encode", x)
    outputs = [_outputs(x, first), _outputs(x.T, second)]
    if kernels is None:
        counters = [Counter(key[0], stream, clock) for stream in key[1:]]
        for i, (view, what) in enumerate(((x, first), (x.T, second))):
            if what is not None:
                found = plain.encoded(view, what, counters[i])
                outputs[i] = found.codes, found.steps
        return (*outputs[0], *outputs[1])
    present = first or second
    assert present is not None
    modes = tuple(_mode(kernels, what) for what in (first, second))
    kinds = tuple(list(DTYPES).index((what or present).format.name) for what in (first, second))
    stochastic = tuple(what is not None and what.rounding == "stochastic" for what in (first, second))
    kernels.encode_both(
        x, (*outputs[0], *outputs[1]), (amax, amax_t), clock, modes, kinds, stochastic,
        max(present.tile[1], (second or present).tile[1], 1), (key[0], key[1], key[2]),
    )  # fmt: skip
    for i, (largest, what) in enumerate(((amax, first), (amax_t, second))):
        if what is not None and what.tile in (TENSOR, ROW):
            step = torch.where(largest.isfinite(), largest * (1.0 / what.format.max_code), torch.nan)
            outputs[i] = outputs[i][0], step.view(-1, 1)
    return (*outputs[0], *outputs[1])


def _mode(kernels: ModuleType, what: Operand | None) -> int:
    if what is None:
        return int(kernels.NONE)
    given = {TENSOR: kernels.ONE, ROW: kernels.ROW}
    return int(given.get(what.tile, kernels.STRIP if what.tile[0] == 1 else kernels.SQUARE))


@_lowp_encode.register_fake
def _(
    x: Tensor, amax: Tensor, amax_t: Tensor, clock: Tensor, along: str, across: str, key: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = (_operand(text) if text else None for text in (along, across))
    return (*_outputs(x, first), *_outputs(x.T, second))


@torch.library.custom_op("commq::lowp_multiply", mutates_args=())
def _lowp_multiply(
    a: Tensor, b: Tensor, a_steps: Tensor, b_steps: Tensor, second: list[Tensor], gemm: str, dtype: torch.dtype
) -> Tensor:
    what = _gemm(gemm)
    if not a.is_cuda and (a.dtype != torch.int8 or _triton("int8", a) is None):
        more = (second[0], second[1], second[2]) if second else None
        on_first = what.first.second != "none"
        first = Codes(a, a_steps, more if on_first else None)
        return plain.multiplied(first, Codes(b, b_steps, None if on_first else more), what).to(dtype)
    if a.dtype == torch.int8:
        return _int8(a, b, a_steps, b_steps, second, what, dtype)
    return _fp8(a, b, a_steps, b_steps, what, dtype)


@_lowp_multiply.register_fake
def _(
    a: Tensor, b: Tensor, a_steps: Tensor, b_steps: Tensor, second: list[Tensor], gemm: str, dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _fp8(a: Tensor, b: Tensor, a_steps: Tensor, b_steps: Tensor, gemm: Gemm, dtype: torch.dtype) -> Tensor:
    """torch's scaled_mm; float32 results only from one scale a tensor, so others go through bfloat16."""
    kinds = F.ScalingType
    if gemm.first.tile == TENSOR:
        recipes = kinds.TensorWise, kinds.TensorWise
    elif gemm.first.tile == ROW:
        recipes = kinds.RowWise, kinds.RowWise
        b_steps = b_steps.T
    else:
        square = gemm.second.tile == (128, 128)
        recipes = kinds.BlockWise1x128, kinds.BlockWise128x128 if square else kinds.BlockWise1x128
        a_steps, b_steps = a_steps.T, b_steps.T
    fast = gemm.first.format == gemm.second.format and gemm.first.tile == TENSOR
    out = dtype if gemm.first.tile == TENSOR else torch.bfloat16
    return F.scaled_mm(
        a, b.T, a_steps, recipes[0], b_steps, recipes[1], output_dtype=out, use_fast_accum=fast
    ).to(dtype)  # fmt: skip


def _int8(
    a: Tensor, b: Tensor, a_steps: Tensor, b_steps: Tensor, second: list[Tensor], gemm: Gemm, dtype: torch.dtype
) -> Tensor:
    kernels = importlib.import_module("commq.lowp.triton_int8")
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
    if gemm.first.tile in (TENSOR, ROW):
        kernels.multiply_rows(a, b, a_steps, b_steps, out)
        return out
    side = gemm.first.tile[0]
    if gemm.second.second != "none":  # the kernel has the second term on its first operand
        kernels.multiply_tiles(b, a, b_steps, a_steps, out, side, second=tuple(second), turned=True)
    else:
        kernels.multiply_tiles(a, b, a_steps, b_steps, out, side, second=tuple(second) or None)
    return out
