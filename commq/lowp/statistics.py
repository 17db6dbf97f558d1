"""What quantization does to the operands of a layer: shares that overflow and underflow, signal to noise.

A watched layer multiplies nothing differently: it quantizes each operand once more, in emulation, and gives a few sums
an operand to its probe as if they were its gradient. So they arrive in compiled graphs too, add up over micro-batches,
and cost nothing while no probe is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from commq.lowp.emulate import SIGNS
from commq.lowp.gemm import GEMMS, Gemm
from commq.lowp.quantize import Counter, outliers, rotated, tiles
from commq.lowp.values import values

OPERANDS = (("input", "weight"), ("gradient", "weight"), ("gradient", "input"))
"""First and second operand of each GEMM."""


@dataclass(frozen=True)
class Statistic:
    """Of one operand of one GEMM of a layer, over the passes that were watched."""

    layer: str
    gemm: str
    operand: str
    overflow: float
    """Share of the elements that are not finite when decoded."""
    underflow: float
    """Share of the elements that are not 0 and become 0."""
    sqnr: float
    """10 log10 of the sum of squares over that of the errors, in dB; infinite if nothing was lost."""
    fallback: float
    """Share of the tiles that have a second term because of outliers."""


def new_probe(device: torch.device) -> Tensor:
    """(6, 6) float32 whose gradient collects the sums of `measure`."""
    return torch.zeros(2 * len(GEMMS), 6, device=device, requires_grad=True)


def measure(
    a_RC: Tensor, b_SC: Tensor, gemm: Gemm | None, counters: tuple[Counter, Counter, Counter], wanted: bool = True
) -> Tensor:
    """(2, 6) float32 of both operands: elements, overflows, underflows, sum of squares, sum of squared errors, and the
    elements of tiles with outliers."""
    if gemm is None or not wanted:
        return a_RC.new_zeros((2, 6), dtype=torch.float32)
    found = []
    for i, (x, operand) in enumerate(((a_RC, gemm.first), (b_SC, gemm.second))):
        h = x.to(torch.float32) if gemm.rotation is None else rotated(x, gemm.rotation, counters[SIGNS])
        q = values(x, operand, counters[i], gemm.rotation, counters[SIGNS]).to(torch.float32)
        fine = q.isfinite() & h.isfinite()
        signal = torch.where(fine, h, 0.0).square().sum()
        noise = torch.where(fine, q - h, 0.0).square().sum()
        fallback = torch.zeros_like(signal)
        if operand.second == "outliers":
            fallback = outliers(tiles(h, operand.tile)[0]).to(torch.float32).mean() * h.numel()
        lost, gone = (each.sum().to(torch.float32) for each in (~fine, (h != 0) & (q == 0)))
        found.append(torch.stack((torch.full_like(signal, h.numel()), lost, gone, signal, noise, fallback)))
    return torch.stack(found)


def read(layer: str, probe: Tensor) -> list[Statistic]:
    """Statistics of what a probe has collected; empties it."""
    sums = [] if probe.grad is None else probe.grad.tolist()
    probe.grad = None
    found = []
    for i, (elements, overflow, underflow, signal, noise, fallback) in enumerate(sums):
        if elements:
            sqnr = 10 * math.log10(signal / noise) if signal and noise else math.inf
            gemm, operand = GEMMS[i // 2], OPERANDS[i // 2][i % 2]
            overflow, underflow, fallback = (each / elements for each in (overflow, underflow, fallback))
            found.append(Statistic(layer, gemm, operand, overflow, underflow, sqnr, fallback))
    return found
