"""Tracker: a reference that all ranks hold, so that only the difference to it has to be sent.

    owner:    d = x - reference ;  send encode(d)
    everyone: reference <- reference + decode(encode(d))

What encoding lost is part of the next difference, so the reference follows x: error feedback without a residual, and
without the error ever being more than that of one encoding. x itself, the fp32 master, is never rounded.
Source: SDP4Bit (Jia et al. 2024, section 3.1, weight differences); EF21 (Richtarik et al. 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Tracker:
    """The reference of W owners' rows: the same bits on every rank, and the own row once more."""

    def __init__(self, world_size: int, row_numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(world_size, row_numel, dtype=dtype, device=device)
        """(W, R). The own row may be overwritten between exchanges; `own` is the one that counts."""
        self.own = torch.zeros(row_numel, dtype=dtype, device=device)
        self.known = False
        """All ranks hold the same rows. If not, rows are sent as they are first."""
        self.has_own = False
        """`own` was restored: it is what the first rows are."""

    def forget(self) -> None:
        """Start anew: the next exchange sends x as it is. For when x was replaced, not trained. All ranks together."""
        self.known = self.has_own = False

    def restore(self, own: Tensor) -> None:
        """Continue from a saved own row, to the bit. All ranks together."""
        if own.shape != self.own.shape:
            raise ValueError(f"tracker: a saved row of {own.numel()} elements, expected {self.own.numel()}")
        self.own.copy_(own)
        self.known, self.has_own = False, True

    def difference(self, x: Tensor) -> Tensor:
        """float32 x - reference, for the own row."""
        return x.to(torch.float32) - self.own.to(torch.float32)

    def settle(self, rank: int) -> None:
        """The rows have been brought up to date."""
        self.own.copy_(self.rows[rank])
        self.known = True
