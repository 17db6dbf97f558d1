"""x w^T and its two gradients, each GEMM as its format says: real where the chip has it, else emulated.

M tokens, K inputs, N outputs. What the backward pass needs of x is saved as it is needed there: as codes along the
tokens (1 byte an element) if the weight gradient is real, else as x. Weights are saved themselves, not their codes, so
that FSDP2 can free them.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.lowp import real
from commq.lowp.codes import ALIGNMENT, Codes, is_real
from commq.lowp.emulate import emulated
from commq.lowp.gemm import Gemm, Precision
from commq.lowp.quantize import Counter
from commq.lowp.statistics import measure

_STREAMS = 16
"""Streams that a layer uses: three for each GEMM, rounded up."""


class _Known:
    """Precisions by the names that plans have for them, as attributes.

    A compiler that traces plans then finds other numbers in other places and takes them as constants. Numbers that
    change in one place become symbols to it, and a format cannot be made of symbols.
    """


_KNOWN = _Known()


@dataclass(frozen=True)
class Plan:
    """What a layer does: its GEMMs, which of them are real, and the key of its random bits."""

    given: Precision
    real: tuple[bool, bool, bool]
    seed: int
    stream: int
    name: str = field(init=False)
    """Of `given`, the same in every process."""

    def __post_init__(self) -> None:
        name = f"precision_{hashlib.sha256(repr(self.given).encode()).hexdigest()}"
        object.__setattr__(self, "name", name)
        setattr(_KNOWN, name, self.given)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.given, self.real, self.seed, self.stream)

    @property
    def precision(self) -> Precision:
        found: Precision = getattr(_KNOWN, self.name)
        return found

    @staticmethod
    def of(
        precision: Precision,
        features: tuple[int, int],
        capability: tuple[int, int] | None,
        *,
        name: str,
        seed: int,
        rank: int,
    ) -> Plan:
        """features: outputs N, inputs K. capability: of the GPU, None on a CPU."""
        outputs, inputs = features
        shapes = (0, outputs, inputs), (0, inputs, outputs), (outputs, inputs, 0)
        first, second, third = (
            is_real(gemm, shape, capability) for gemm, shape in zip(precision.gemms, shapes, strict=True)
        )
        stream = zlib.crc32(f"{name}/{rank}".encode()) // _STREAMS * _STREAMS
        return Plan(precision, (first, second, third), seed, stream)

    def counters(self, gemm: int, step: Tensor) -> tuple[Counter, Counter, Counter]:
        """Of the first operand, the second, and the signs of a rotation."""
        first, second, signs = (Counter(self.seed, self.stream + 3 * gemm + use, step) for use in range(3))
        return first, second, signs


class Product(torch.autograd.Function):
    """y_MN = x_MK w_NK^T in the dtype of x. probe: collects statistics, see statistics.py."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, step: Tensor, plan: Plan, probe: Tensor | None) -> Tensor:
        forward, _, weight_gradient = plan.precision.gemms
        step = step.clone()  # a backward pass uses the number of its forward pass
        counters, later = plan.counters(0, step), plan.counters(2, step)
        ctx.plan, ctx.dtype, ctx.tokens = plan, x_MK.dtype, x_MK.shape[0]
        wanted = plan.real[0], plan.real[2] and ctx.needs_input_grad[1]
        padded_MK = _padded(x_MK) if any(wanted) else x_MK
        x, x_t = _encode(padded_MK, forward, weight_gradient, wanted, 0, (counters, later))
        if forward is not None and x is not None:
            w, _ = real.encode(w_NK.contiguous(), forward.second, None, (counters[1], counters[1]))
            assert w is not None
            y_MN = real.multiply(x, w, forward, x_MK.dtype)[: x_MK.shape[0]]
        else:
            y_MN = _multiply(x_MK, w_NK, forward, counters, x_MK.dtype)
        saved = (x_MK,) if x_t is None else (x_t.codes, x_t.steps, *(x_t.second or ()))
        watched = () if probe is None else (x_MK, measure(x_MK, w_NK, forward, counters))
        ctx.watched = len(watched)
        ctx.save_for_backward(w_NK, step, *watched, *saved)
        return y_MN

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
        # A compiler traces this where the forward pass runs, under its autocast.
        with torch.autocast(dy_MN.device.type, enabled=False):
            return _gradients(ctx, dy_MN)


def _gradients(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
    w_NK, step, *saved = ctx.saved_tensors
    watched, saved = saved[: ctx.watched], saved[ctx.watched :]
    plan: Plan = ctx.plan
    _, input_gradient, weight_gradient = plan.precision.gemms
    counters, later = plan.counters(1, step), plan.counters(2, step)
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    wanted = plan.real[1] and needs_dx, plan.real[2] and needs_dw
    padded_MN = _padded(dy_MN) if any(wanted) else dy_MN
    dy, dy_t = _encode(padded_MN, input_gradient, weight_gradient, wanted, 1, (counters, later))
    dx_MK = dw_NK = None
    if input_gradient is not None and dy is not None:
        _, w_t = real.encode(w_NK.contiguous(), None, input_gradient.second, (counters[1], counters[1]))
        assert w_t is not None
        dx_MK = real.multiply(dy, w_t, input_gradient, ctx.dtype)[: ctx.tokens]
    elif needs_dx:
        dx_MK = _multiply(dy_MN, w_NK.T, input_gradient, counters, ctx.dtype)
    if weight_gradient is not None and dy_t is not None:
        x_t = Codes(saved[0], saved[1], (saved[2], saved[3], saved[4]) if len(saved) > 2 else None)
        dw_NK = real.multiply(dy_t, x_t, weight_gradient, ctx.dtype).to(w_NK.dtype)
    elif needs_dw:
        dw_NK = _multiply(dy_MN.T, saved[0].T, weight_gradient, later, w_NK.dtype)
    if not watched:
        return dx_MK, dw_NK, None, None, None
    sums = (
        watched[1],
        measure(dy_MN, w_NK.T, input_gradient, counters, needs_dx),
        measure(dy_MN.T, watched[0].T, weight_gradient, later, needs_dw),
    )
    return dx_MK, dw_NK, None, None, torch.cat(sums)


def _encode(
    x: Tensor,
    gemm: Gemm | None,
    weight_gradient: Gemm | None,
    wanted: tuple[bool, bool],
    pass_number: int,
    counters: tuple[tuple[Counter, Counter, Counter], tuple[Counter, Counter, Counter]],
) -> tuple[Codes | None, Codes | None]:
    """Codes of x (pass 0) or dy (1) for the GEMM of its pass, and along the tokens for the weight gradient."""
    along = gemm.first if gemm is not None and wanted[0] else None
    across = None
    if weight_gradient is not None and wanted[1]:  # dy^T is its first operand, x^T its second
        across = weight_gradient.first if pass_number else weight_gradient.second
    if along is None and across is None:
        return None, None
    return real.encode(x, along, across, (counters[0][0], counters[1][1 - pass_number]))


def _padded(x_MC: Tensor) -> Tensor:
    """Contiguous, with rows of zeros up to a multiple of ALIGNMENT, and no fewer."""
    tokens = x_MC.shape[0]
    missing = max(-(-tokens // ALIGNMENT), 1) * ALIGNMENT - tokens
    return F.pad(x_MC, (0, 0, 0, missing)) if missing else x_MC.contiguous()


def _multiply(
    a_RC: Tensor, b_SC: Tensor, gemm: Gemm | None, counters: tuple[Counter, Counter, Counter], dtype: torch.dtype
) -> Tensor:
    """a @ b.T as `gemm` says, in `dtype`, emulated."""
    if gemm is None:
        return (a_RC @ b_SC.to(a_RC.dtype).T).to(dtype)
    return emulated(a_RC, b_SC, gemm, counters).to(dtype)
