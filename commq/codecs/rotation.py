"""Rotation: an orthogonal transform of runs of n elements, applied once before encoding and undone once at the end.

It spreads an outlier over its run, which is what a shared scale wants. Being linear, it commutes with the sum over
ranks, so the reduction happens between the two. H is the Walsh-Hadamard matrix in natural order, H H = n I; the
factor 1 / n is split into two exact powers of two, so that a constant survives to the bit. Inputs above 2**127 / n
may overflow, and then arrive as NaN like any block that is not finite.
Source: SDP4Bit (Jia et al. 2024, section 3.2); random signs: EDEN (Vargaftik et al. 2022, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commq.codecs.philox import random_signs

SIGNS_STREAM = 0x524F5441
"""Philox stream of the random signs; every rank uses the same one."""


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Hadamard transform of runs of `size` elements, optionally with random signs first."""

    size: int = 32
    """Run length n: a power of two from 16 to 1024."""
    signs: bool = False
    """Multiply position i of every run by a random sign, drawn anew each step and the same on all ranks."""

    def __post_init__(self) -> None:
        if not (16 <= self.size <= 1024 and self.size & (self.size - 1) == 0):
            raise ValueError(f"rotation size={self.size}: expected a power of two from 16 to 1024, such as 32")

    def sign_pattern(self, *, seed: int, step: int, device: torch.device) -> Tensor | None:
        """The n signs of this step as float32, or None without signs."""
        if not self.signs:
            return None
        return random_signs(self.size, seed=seed, step=step, stream=SIGNS_STREAM, device=device)


def hadamard(x_N: Tensor, size: int) -> Tensor:
    """H x for each run of `size` elements of float32 x_N, not normalised.

    Butterflies (a + b, a - b) at distance 1, 2, 4, ... size / 2, in this order: part of the specification.
    """
    x_RS = x_N.reshape(-1, size)
    half = 1
    while half < size:
        pairs = x_RS.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x_RS = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x_RS.reshape(x_N.shape)


def rotate(x_N: Tensor, rotation: Rotation, signs_S: Tensor | None) -> Tensor:
    """Rotate float32 x_N (N a multiple of rotation.size): H (signs * x) * 2**-floor(log2(n) / 2)."""
    if signs_S is not None:
        x_N = (x_N.view(-1, rotation.size) * signs_S).view(x_N.shape)
    return hadamard(x_N, rotation.size) * 2.0 ** -(_log2(rotation) // 2)


def unrotate(y_N: Tensor, rotation: Rotation, signs_S: Tensor | None) -> Tensor:
    """Undo `rotate`: signs * H y * 2**-ceil(log2(n) / 2)."""
    x_N = hadamard(y_N, rotation.size) * 2.0 ** -((_log2(rotation) + 1) // 2)
    return x_N if signs_S is None else (x_N.view(-1, rotation.size) * signs_S).view(x_N.shape)


def _log2(rotation: Rotation) -> int:
    return rotation.size.bit_length() - 1
