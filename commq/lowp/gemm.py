"""GEMMs: the formats of both operands, and of the three GEMMs of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from commq.codecs.rotation import Rotation
from commq.lowp.operand import Operand, operand

GEMMS = ("forward", "input_gradient", "weight_gradient")
"""y = x w^T; dx = dy w; dw = dy^T x. First operand first: x, dy, dy^T; then w, w^T, x^T."""


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """a_RC @ b_SC.T with both operands in low precision."""

    first: Operand
    """x, dy or dy^T: never the weight."""
    second: Operand
    """w, w^T or x^T."""
    rotation: Rotation | None = None
    """Hadamard transform of runs along the contraction, of both operands: their product stays what it was."""

    def __post_init__(self) -> None:
        if self.rotation is not None and (self.first.is_raw or self.second.is_raw):
            raise ValueError(f"rotation with operands {self.first} and {self.second}: nothing to spread in a raw one")

    def __str__(self) -> str:
        # joined with +: a compiler that traces this does not format objects
        operands = str(self.first) if self.first == self.second else str(self.first) + " x " + str(self.second)
        if self.rotation is None:
            return operands
        return operands + " random" * self.rotation.signs + " hadamard " + str(self.rotation.size)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The three GEMMs of a linear layer. None: as nn.Linear computes it, in the dtype of its input."""

    forward: Gemm | None = None
    input_gradient: Gemm | None = None
    weight_gradient: Gemm | None = None

    @property
    def gemms(self) -> tuple[Gemm | None, Gemm | None, Gemm | None]:
        return self.forward, self.input_gradient, self.weight_gradient

    @property
    def is_plain(self) -> bool:
        return all(gemm is None for gemm in self.gemms)

    def __str__(self) -> str:
        return " | ".join("as it is" if gemm is None else str(gemm) for gemm in self.gemms)

    def plain(self) -> dict[str, str | None]:
        """As text, for configurations and checkpoints; `precision` reads it."""
        return {name: None if gemm is None else str(gemm) for name, gemm in zip(GEMMS, self.gemms, strict=True)}


def gemm(text: str) -> Gemm:
    """The Gemm that its text describes: "int8/row", "fp8_e5m2/tensor x fp8_e4m3/tensor", "int4 random hadamard 16"."""
    operands, _, size = text.partition("hadamard")
    signs = operands.rstrip().endswith("random")
    first, _, second = operands.strip().removesuffix("random").partition(" x ")
    if size and not size.strip().isdigit():
        raise ValueError(f"gemm {text!r}: 'hadamard {size.strip()}', expected a size such as hadamard 32")
    rotation = Rotation(size=int(size), signs=signs) if size else None
    return Gemm(first=operand(first.strip()), second=operand((second or first).strip()), rotation=rotation)


def precision(entries: Mapping[str, str | None]) -> Precision:
    """The Precision that texts of its GEMMs describe; what is not named stays as it is."""
    if unknown := sorted(set(entries) - set(GEMMS)):
        raise ValueError(f"precision of {', '.join(unknown)}: expected {', '.join(GEMMS)}")
    return Precision(**{name: None if text is None else gemm(text) for name, text in entries.items()})
