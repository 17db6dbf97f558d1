"""Operands: how one of the two matrices of a GEMM becomes codes.

Every GEMM here is a_RC @ b_SC.T: both operands have the contraction along their last axis, C. An operand's format says
what a code is, its tile which elements share a scale, its rounding how a number becomes a code. As text:

    int8/row                 one scale for each row (along the contraction)
    fp8_e4m3/tensor          one scale
    fp8_e4m3/1x128           one for each 128 elements along the contraction
    fp8_e4m3/128x128         one for each 128 rows x 128 elements
    int4/1x32:stochastic     rounded stochastically
    int4/row+all             a second term of the same format for what the first one lost
    int8/128x128+outliers    the second term only in tiles whose largest number stands out
    bf16, fp32               no codes: the matrix in that dtype
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from commq.codecs.formats import FORMATS, Format

Rounding = Literal["nearest", "stochastic"]
Second = Literal["none", "all", "outliers"]

OUTLIER = 4.0
"""A tile stands out if its largest number is this many times the geometric mean over all tiles."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """Format, tile and rounding of one operand (R, C) of a GEMM."""

    format: Format
    tile: tuple[int, int] = (1, 0)
    """Rows and elements along the contraction that share a scale; 0: all of them."""
    rounding: Rounding = "nearest"
    """Of the last term: with two terms the first is rounded to nearest, so that a stochastic second makes the sum
    unbiased."""
    second: Second = "none"
    """A second term of the same format for what the first one lost: in all tiles, or in those with outliers."""

    def __post_init__(self) -> None:
        if self.is_raw:
            if self.rounding != "nearest" or self.second != "none":
                raise ValueError(f"operand {self.format.name}: a raw operand is neither rounded nor in two terms")
            return
        if self.format.kind not in ("integer", "float"):
            raise ValueError(
                f"operand format {self.format.name!r}: expected an integer or small float format, such as int8, int4, "
                "fp8_e4m3, mxfp4 or nvfp4, or bf16 or fp32"
            )
        rows, columns = self.tile
        if rows < 0 or columns < 0 or (rows, columns) == (0, 1):
            raise ValueError(f"operand tile={self.tile}: expected (rows, columns) >= 0, 0 meaning all")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"operand rounding={self.rounding!r}: expected 'nearest' or 'stochastic'")
        if self.second not in ("none", "all", "outliers"):
            raise ValueError(f"operand second={self.second!r}: expected 'none', 'all' or 'outliers'")

    def __str__(self) -> str:
        if self.is_raw:
            return self.format.name
        second = {"none": "", "all": "+all", "outliers": "+outliers"}[self.second]
        return f"{self.kind}{second}" + ":stochastic" * (self.rounding == "stochastic")

    @property
    def kind(self) -> str:
        """Format and tile, such as int8/row."""
        return f"{self.format.name}/{_tile_name(self.tile)}"

    @property
    def is_raw(self) -> bool:
        return self.format.kind == "raw"


def operand(text: str) -> Operand:
    """The operand that `text` describes, as in the list above; ValueError with the grammar if it does not."""
    body, _, rounding = text.partition(":")
    body, _, second = body.partition("+")
    name, _, tile = body.partition("/")
    fmt = FORMATS.get(name)
    if fmt is None:
        raise ValueError(f"operand {text!r}: format {name!r} is unknown; expected one of {', '.join(FORMATS)}")
    if fmt.kind == "raw" and not (tile or second or rounding):
        return Operand(format=fmt)
    return Operand(
        format=fmt,
        tile=_tile(tile, fmt, text),
        rounding=rounding or "nearest",  # type: ignore[arg-type]
        second=second or "none",  # type: ignore[arg-type]
    )


_TILES = {"tensor": (0, 0), "row": (1, 0)}


def _tile_name(tile: tuple[int, int]) -> str:
    names = {value: name for name, value in _TILES.items()}
    return names.get(tile, f"{tile[0]}x{tile[1]}")


def _tile(text: str, fmt: Format, whole: str) -> tuple[int, int]:
    if not text:
        return (1, fmt.block) if fmt.scale in ("e8m0", "e4m3") else (1, 0)
    if text in _TILES:
        return _TILES[text]
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise ValueError(f"operand {whole!r}: tile {text!r}, expected tensor, row or ROWSxCOLUMNS such as 1x128")
    return int(rows), int(columns)
