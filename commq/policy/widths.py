"""Bit widths that follow the gradients: as few bits as keep the noise of rounding below a share of the mean gradient.

With unbiased formats of relative squared error d (|x - x_hat|**2 = d |x|**2 on average), the mean of W ranks' messages
has the error d / W * mean |g_w|**2. The format with the fewest bits for which that is at most mu * |mean g|**2 is used:
few bits where ranks agree, more where the mean is small beside what each rank sends, as late in training.
Source: Double Quantization (Yu et al. 2019), which bounds the error of quantized parameters by mu times the square of
the full gradient, step by step. Differs: its rule is for a parameter server and variance-reduced gradients; here it is
for gradients, in both directions (DDP sends parameters once, when it is made), and d is that of EDEN's levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from commq.codecs.formats import Format, get_format
from commq.codecs.levels import LLOYD_MAX, relative_error


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Which of eden1 to eden4 a recipe uses, and when that is decided anew."""

    mu: float = 0.25
    """The share of |mean gradient|**2 that the error of the mean may have."""
    every: int = 100
    """Steps between decisions; each holds from the next step on."""

    def __post_init__(self) -> None:
        if not self.mu > 0 or self.every < 1:
            raise ValueError(f"widths mu={self.mu}, every={self.every}: expected mu above 0 and steps of 1 or more")

    def due(self, step: int) -> bool:
        """Whether the gradients of step number `step` are measured."""
        return step % self.every == 0

    def measure(self, x_N: Tensor, mean_N: Tensor, fmt: Format) -> list[float]:
        """Squares of this rank's gradient and of the mean; [] if one is not finite. Waits for the device."""
        squares = [float(x.to(torch.float32).square().sum(dtype=torch.float64)) for x in (x_N, mean_N)]
        return squares if all(square < float("inf") for square in squares) else []

    def adapted(self, fmt: Format, sums: Sequence[float], world_size: int) -> Format:
        """`fmt` in as many bits as it takes. sums: of what all ranks measured.

        The mean's square holds the error of what measured it: `fmt` is taken to have added its own, which is removed.
        """
        noise = sums[0] / world_size  # of d = 1, in the unit of the next: both are sums over ranks
        signal = max(sums[1] - relative_error(fmt.bits) * noise, 0.0)
        fits = [bits for bits in LLOYD_MAX if relative_error(bits) * noise <= self.mu * signal]
        return get_format(f"eden{min(fits, default=max(LLOYD_MAX))}", block=fmt.block, scale=fmt.scale)
