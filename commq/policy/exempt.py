"""Exemptions: parameters whose gradients travel uncoded."""

from __future__ import annotations

from dataclasses import dataclass

from commq.codecs.formats import Format, get_format


@dataclass(frozen=True, kw_only=True)
class Exempt:
    """Which parameters' gradients travel uncoded (as bf16, in the same exchange)."""

    one_dimensional: bool = True
    """Biases and norms: few bytes, and their gradients do not look like their neighbours'."""
    min_numel: int = 2048
    """Parameters with fewer elements than this are exempt too."""
    format: Format = get_format("bf16")

    def __post_init__(self) -> None:
        if self.format.kind != "raw":
            raise ValueError(f"exempt format={self.format}: expected fp32, bf16 or fp16")
        if self.min_numel < 0:
            raise ValueError(f"exempt min_numel={self.min_numel}: expected elements >= 0")

    def covers(self, shape: tuple[int, ...], numel: int) -> bool:
        return (self.one_dimensional and len(shape) <= 1) or numel < self.min_numel
