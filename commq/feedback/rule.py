"""Rules of error feedback, as values.

With h = gradient + residual e and sent = decode(encode(h)):

    none      nothing is kept
    classic   e <- h - sent                                   (1-bit SGD, Seide et al. 2014; EF-SignSGD)
    averaged  e <- decay * e + (1 - decay) * (h - sent)       (LoCo, Xie et al. 2024), zeroed every `reset_every` steps

Classic loses nothing: gradient + old residual == sent + new residual, to the bit in float32 with nearest rounding.
Averaged removes the long-run bias of rounding without the per-step noise of classic, which suits 4 bits and Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Which rule, and how the residual is stored (one number for each gradient element, on every rank)."""

    rule: Literal["none", "classic", "averaged"] = "none"
    decay: float = 0.8
    """Averaged only: weight of the OLD residual, in (0, 1)."""
    reset_every: int = 512
    """Averaged only: optimizer steps between resets to zero; 0 never resets."""
    storage: Literal["fp32", "bf16", "int8"] = "fp32"
    """4, 2 or about 1 byte an element; int8 has one fp32 scale for each block of the format."""

    def __post_init__(self) -> None:
        if self.rule not in ("none", "classic", "averaged"):
            raise ValueError(f"feedback rule={self.rule!r}: expected 'none', 'classic' or 'averaged'")
        if self.storage not in ("fp32", "bf16", "int8"):
            raise ValueError(f"feedback storage={self.storage!r}: expected 'fp32', 'bf16' or 'int8'")
        if self.rule == "averaged" and not 0.0 < self.decay < 1.0:
            raise ValueError(
                f"feedback decay={self.decay}: expected 0 < decay < 1, the weight of the old residual; "
                "0 would be rule='classic', 1 would never learn anything"
            )
        if self.reset_every < 0:
            raise ValueError(f"feedback reset_every={self.reset_every}: expected steps >= 0 (0: never)")

    @property
    def weight(self) -> float:
        """Weight of the old residual in the update: `decay`, or 0 for classic."""
        return self.decay if self.rule == "averaged" else 0.0

    def resets(self, step: int) -> bool:
        """Whether the residuals are zeroed before step number `step` (0, 1, 2, ...)."""
        return self.rule == "averaged" and self.reset_every > 0 and step > 0 and step % self.reset_every == 0
