"""Linear layers with three GEMMs in low precision.

M rows of the input (tokens), K inputs, N outputs:

    y_MN = x_MK w_NK^T       dx_MK = dy_MN w_NK        dw_NK = dy_MN^T x_MK

Each is a Gemm with the contraction along the last axis of both operands. The layer keeps parameters, names and hooks of
the nn.Linear it was: `convert` changes its class. Parameters are read when the layer runs, as FSDP2 needs it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commq.lowp.emulate import emulated
from commq.lowp.gemm import Gemm, Precision
from commq.lowp.quantize import Counter

_STREAMS = 16
"""Streams that a layer uses: three for each GEMM, rounded up."""


class Clock:
    """The number of the pass that runs, shared by all layers: one int64 on their device."""

    def __init__(self, device: torch.device) -> None:
        self.step = torch.zeros((), dtype=torch.int64, device="cpu" if device.type == "meta" else device)

    def set(self, step: int, device: torch.device) -> None:
        if self.step.device != device:
            self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.step.fill_(step)


@dataclass(frozen=True)
class Randomness:
    """Key of a layer's random bits: the run's seed, and its first stream."""

    seed: int
    stream: int

    @staticmethod
    def of(name: str, seed: int, rank: int) -> Randomness:
        return Randomness(seed, zlib.crc32(f"{name}/{rank}".encode()) // _STREAMS * _STREAMS)

    def counters(self, gemm: int, step: Tensor) -> tuple[Counter, Counter, Counter]:
        first, second, signs = (Counter(self.seed, self.stream + 3 * gemm + use, step) for use in range(3))
        return first, second, signs


class Linear(nn.Linear):
    """nn.Linear whose GEMMs are computed as `precision` says; made by `convert`."""

    precision: Precision
    randomness: Randomness
    clock: Clock

    def forward(self, x: Tensor) -> Tensor:
        if self.precision.is_plain:
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y = _Product.apply(
                x.reshape(-1, self.in_features), self.weight, self.clock.step, self.precision, self.randomness
            )
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.precision}"


class _Product(torch.autograd.Function):
    """x_MK w_NK^T and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, w_NK: Tensor, step: Tensor, precision: Precision, randomness: Randomness
    ) -> Tensor:
        step = step.clone()  # a backward pass uses the number of its forward pass
        ctx.save_for_backward(x_MK, w_NK, step)
        ctx.precision, ctx.randomness = precision, randomness
        return _multiply(x_MK, w_NK, precision.forward, randomness.counters(0, step), x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, w_NK, step = ctx.saved_tensors
        precision, randomness = ctx.precision, ctx.randomness
        dx_MK = dw_NK = None
        if ctx.needs_input_grad[0]:
            counters = randomness.counters(1, step)
            dx_MK = _multiply(dy_MN, w_NK.T, precision.input_gradient, counters, x_MK.dtype)
        if ctx.needs_input_grad[1]:
            counters = randomness.counters(2, step)
            dw_NK = _multiply(dy_MN.T, x_MK.T, precision.weight_gradient, counters, w_NK.dtype)
        return dx_MK, dw_NK, None, None, None


def _multiply(
    a_RC: Tensor, b_SC: Tensor, gemm: Gemm | None, counters: tuple[Counter, Counter, Counter], dtype: torch.dtype
) -> Tensor:
    """a @ b.T as `gemm` says, in `dtype`."""
    if gemm is None:
        return (a_RC @ b_SC.to(a_RC.dtype).T).to(dtype)
    return emulated(a_RC, b_SC, gemm, counters).to(dtype)
