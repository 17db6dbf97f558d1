"""What an exchange cost: steps, bytes on the wire, time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals of this rank since the handle was made (or its state loaded)."""

    steps: int
    """Optimizer steps exchanged."""
    raw_bytes: int
    """Bytes this rank would have sent with fp32 on the same path: 2 (W - 1) * 4 ceil(N / W) for each tensor."""
    sent_bytes: int
    """Bytes this rank sent, scales, exemptions and padding included (what it kept for itself is not counted)."""
    received_bytes: int
    seconds: float
    """Time spent encoding, exchanging and decoding: on a GPU, where it may overlap with backward, of all of the first
    16 steps, then of one step in 16, which counts for all of them."""
    residual_norm: float
    """2-norm of all residuals of this rank."""

    @property
    def ratio(self) -> float:
        """sent_bytes / raw_bytes; 1.0 if nothing had to be sent."""
        return self.sent_bytes / self.raw_bytes if self.raw_bytes else 1.0
