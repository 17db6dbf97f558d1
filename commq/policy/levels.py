"""Adaptive levels: tables of levels that follow the gradients they send.

Stochastic rounding between levels a <= t <= c has the variance (c - t)(t - a). A histogram of |t| = |x| / max|block|,
in which elements weigh max|block|**2, says what any table would cost; all ranks add theirs and find the same table:

    alq  coordinate descent: level l between a and c is best where F(l) = F(c) - int_a^c (t - a) / (c - a) dF(t)
    amq  levels +-p**j: the best p, by golden section

Source: ALQ and AMQ (Faghri et al. 2020). They scale by the 2-norm of a bucket and fit truncated normals; here the scale
is the largest magnitude, so that levels up to 1 are used, and the histogram itself is the distribution. Their AMQ
descends a gradient. The condition for l is the zero of the variance's derivative, which grows with l.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.levels import symmetric

BINS = 512
_SWEEPS = 30


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """How the levels of a recipe's format follow the gradients, and when."""

    method: Literal["alq", "amq"] = "alq"
    first: tuple[int, ...] = (100, 2000)
    """Steps whose gradients are measured; the new levels hold from the next one on."""
    every: int = 10_000
    """After those also every so many steps; 0: never again."""

    def __post_init__(self) -> None:
        if self.method not in ("alq", "amq"):
            raise ValueError(f"adapt method={self.method!r}: expected 'alq' or 'amq'")
        if any(step < 0 for step in self.first) or self.every < 0:
            raise ValueError(f"adapt first={self.first}, every={self.every}: expected steps >= 0")

    def due(self, step: int) -> bool:
        """Whether the gradients of step number `step` are measured."""
        return step in self.first or (self.every > 0 and step > 0 and step % self.every == 0)

    def measure(self, x_N: Tensor, mean_N: Tensor, fmt: Format) -> list[float]:
        """The histogram of this rank's gradient. Waits for the device."""
        weights: list[float] = histogram(x_N, fmt).tolist()
        return weights

    def adapted(self, fmt: Format, weights: Sequence[float], world_size: int = 1) -> Format:
        """`fmt` with the levels that suit a histogram; the same one if nothing was measured."""
        if not sum(weights) > 0:
            return fmt
        positive = tuple(level for level in fmt.levels if level > 0)
        zero = 0.0 in fmt.levels
        found = _descend(positive, weights) if self.method == "alq" else _powers(len(positive), zero, weights)
        return replace(fmt, levels=symmetric(found, zero))


def histogram(x_N: Tensor, fmt: Format) -> Tensor:
    """float64 (BINS,): the weight of elements by |x| / max|block|. Blocks that are not finite do not count.

    Weights are whole multiples of 2**-24 of the largest, so their sums do not depend on the order of additions.
    """
    x_N = x_N.detach().to(torch.float32)
    x_GB = torch.nn.functional.pad(x_N.abs(), (0, -x_N.numel() % fmt.block)).view(-1, fmt.block)
    largest_G = x_GB.amax(dim=1)
    finite_G = largest_G.isfinite() & (largest_G > 0)
    x_GB, largest_G = x_GB[finite_G], largest_G[finite_G].to(torch.float64)
    if not len(largest_G):
        return torch.zeros(BINS, dtype=torch.float64, device=x_N.device)
    top = largest_G.max()
    weight_G = ((largest_G / top).square() * 2**24).round()
    bins_GB = (x_GB / largest_G[:, None] * BINS).clamp(max=BINS - 1).to(torch.int64)
    counts = torch.bincount(bins_GB.view(-1), weights=weight_G.repeat_interleave(fmt.block), minlength=BINS)
    return counts * 2.0**-24 * top.square()


def variance(levels: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of (c - t)(t - a) over a histogram, t standing in the middle of its bin; `levels` as in a Format."""
    total = 0.0
    for k, weight in enumerate(weights):
        t = (k + 0.5) / BINS
        above = min(bisect_left(levels, t), len(levels) - 1)
        total += weight * (levels[above] - t) * (t - levels[above - 1])
    return total / sum(weights)


def _descend(positive: tuple[float, ...], weights: Sequence[float]) -> tuple[float, ...]:
    """Positive levels, the last of them 1, moved one by one to where the variance is least. 0 is a level, too."""
    edges = [k / BINS for k in range(BINS + 1)]
    mass = [0.0, *accumulate(weights)]
    moment = [0.0, *accumulate(w * (k + 0.5) / BINS for k, w in enumerate(weights))]

    def at(t: float) -> tuple[float, float]:
        """Mass and first moment below t, a bin's mass being spread evenly."""
        k = min(int(t * BINS), BINS - 1)
        density = weights[k] * BINS
        return mass[k] + density * (t - edges[k]), moment[k] + density * (t * t - edges[k] ** 2) / 2

    levels = [0.0, *positive]
    for _ in range(_SWEEPS):
        for j in range(1, len(levels) - 1):
            a, c = levels[j - 1], levels[j + 1]
            (mass_a, moment_a), (mass_c, moment_c) = at(a), at(c)
            wanted = mass_c - ((moment_c - moment_a) - a * (mass_c - mass_a)) / (c - a)
            k = max(bisect_left(mass, wanted) - 1, 0)
            share = (wanted - mass[k]) / (mass[k + 1] - mass[k]) if mass[k + 1] > mass[k] else 0.5
            # Never onto a neighbour: levels stay apart by a hundredth of the gap.
            levels[j] = min(max((k + share) / BINS, a + 0.01 * (c - a)), c - 0.01 * (c - a))
    return tuple(levels[1:])


def _powers(count: int, zero: bool, weights: Sequence[float]) -> tuple[float, ...]:
    def table(p: float) -> tuple[float, ...]:
        return tuple(p**j for j in reversed(range(count)))

    def cost(p: float) -> float:
        return variance(symmetric(table(p), zero), weights)

    start = min((k / 20 for k in range(1, 20)), key=cost)
    low, high, ratio = start - 0.049, start + 0.049, (math.sqrt(5) - 1) / 2
    for _ in range(30):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost(left) < cost(right) else (left, high)
    return table((low + high) / 2)
