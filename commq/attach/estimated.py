"""What compression costs in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank, besides what DDP or FSDP2 itself takes."""

    residual: int = 0
    """Of the first hop: every element that is encoded with feedback, on every rank; in HSDP, of shards."""
    answer_residual: int = 0
    """Of the second hop, float32: the elements that this rank owns; sharded, also those of its peers on other hosts."""
    tables: int = 0
    """Numbers of blocks, for stochastic rounding and sign."""
    reference: int = 0
    """What differences of weights are to: all parameters, as they are gathered, and the own shards once more."""
    wire: int = 0
    """Buffers that are sent, received, or hold aligned copies: most at any time of a step. They are lent, not kept."""

    @property
    def total(self) -> int:
        return self.residual + self.answer_residual + self.tables + self.reference + self.wire
