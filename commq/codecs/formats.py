"""Formats: how a block of numbers becomes bits.

A format is a value, not a class per method. Every block format is the same five lines of arithmetic
(see `reference.py`) with other constants:

    s     = magnitude of the block (largest |x|, or mean |x| for sign), rounded to the scale's dtype
    t     = x * (max_code / s)                 in [-max_code, max_code]
    code  = t rounded to the nearest (or a random neighbouring) representable code
    x_hat = (code * (1 / max_code)) * s

The scale stores the magnitude and not the step, so the largest value of a block, and a block of ones, survive
exactly: fl(max_code * fl(1 / max_code)) == 1 in float32 for every max_code used here (a test holds this).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["raw", "integer", "float", "sign"]
ScaleKind = Literal["none", "fp32", "bf16", "e8m0", "e4m3"]

SCALE_BYTES: dict[str, int] = {"none": 0, "fp32": 4, "bf16": 2, "e8m0": 1, "e4m3": 1}

MIN_BLOCK, MAX_BLOCK = 16, 4096


@dataclass(frozen=True, kw_only=True)
class Format:
    """How B consecutive elements (a block) become codes and one scale."""

    name: str
    kind: Kind
    bits: int
    """Bits per code on the wire: 1, 2, 4, 8, 16 or 32."""
    max_code: float = 0.0
    """Largest magnitude of a code: 127 for int8, 448 for e4m3, 1 for sign; 0 for raw formats."""
    mantissa: int = 0
    """Explicit mantissa bits of a float code."""
    exponent: int = 0
    """Exponent bits of a float code; the bias is 2**(exponent - 1) - 1."""
    block: int = 16
    """Elements that share one scale: a power of two, 16..4096. Raw formats have no scale; theirs is unused."""
    scale: ScaleKind = "none"
    """dtype of a block's scale. Integer and fp8 scales in bf16 are rounded up, so that nothing clips."""
    group: int = 0
    """Elements that share a second, fp32 scale above the e4m3 block scales (nvfp4); 0: there is none."""

    def __post_init__(self) -> None:
        if self.kind == "raw":
            return
        if not (
            isinstance(self.block, int) and MIN_BLOCK <= self.block <= MAX_BLOCK and self.block & (self.block - 1) == 0
        ):
            raise ValueError(
                f"block={self.block!r} for format {self.name!r}: expected a power of two from {MIN_BLOCK} to "
                f"{MAX_BLOCK}, such as 64, 128 or 256"
            )
        allowed = SCALES[self.name]
        if self.scale not in allowed:
            raise ValueError(f"scale={self.scale!r} for format {self.name!r}: expected one of {', '.join(allowed)}")

    def __str__(self) -> str:
        return self.name if self.kind == "raw" else f"{self.name}/{self.block}:{self.scale}"

    @property
    def bits_per_element(self) -> float:
        """Wire bits per element of a whole block, scales included: 4.25 for int4 at block 128."""
        scales = 8 * SCALE_BYTES[self.scale] / self.block + (32 / self.group if self.group else 0)
        return self.bits + scales

    @property
    def unit(self) -> int:
        """Elements that must stay together: the group if there is one, else the block; 1 for raw formats."""
        return 1 if self.kind == "raw" else max(self.block, self.group)

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding makes the decoded value's expectation the input (within 2**-17 of a step)."""
        return self.name not in ("fp32", "fp16")

    @property
    def integer_summable(self) -> bool:
        """Codes of several ranks may be added as integers if the ranks share the scale."""
        return self.kind in ("integer", "sign")

    @property
    def contraction(self) -> float:
        """A d with ||x - x_hat||**2 <= d * ||x||**2 for every block of normal numbers under nearest rounding.

        Every code nearest to its input is no farther than the code 0, and the largest element keeps at least
        0.9 of its energy; sign with the mean as scale loses 1 - (||x||_1 / ||x||_2)**2 / B of a block
        (Karimireddy et al. 2019, Lemma 8). fp16 overflows, so it promises nothing (1.0).
        """
        if self.kind == "raw":
            return {"fp32": 0.0, "bf16": 2.0**-16, "fp16": 1.0}[self.name]
        return 1.0 - 0.9 / self.block


SCALES: dict[str, tuple[str, ...]] = {
    "int8": ("fp32", "bf16"),
    "int4": ("fp32", "bf16"),
    "int2": ("fp32", "bf16"),
    "sign": ("bf16", "fp32"),
    "fp8_e4m3": ("fp32", "bf16"),
    "fp8_e5m2": ("fp32", "bf16"),
    "mxfp8": ("e8m0",),
    "mxfp4": ("e8m0",),
    "nvfp4": ("e4m3",),
}
"""Scale dtypes each block format can have; the first is the default."""


def _block_format(name: str, kind: Kind, bits: int, block: int, max_code: float, **floats: int) -> Format:
    scale: ScaleKind = SCALES[name][0]  # type: ignore[assignment]
    return Format(name=name, kind=kind, bits=bits, block=block, max_code=max_code, scale=scale, **floats)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="fp32", kind="raw", bits=32, exponent=8, mantissa=23),
        Format(name="bf16", kind="raw", bits=16, exponent=8, mantissa=7),
        Format(name="fp16", kind="raw", bits=16, exponent=5, mantissa=10),
        _block_format("int8", "integer", 8, 128, 127.0),
        _block_format("int4", "integer", 4, 128, 7.0),  # 15 levels: the 16th, -8, would bias
        _block_format("int2", "integer", 2, 128, 1.0),
        _block_format("sign", "sign", 1, 128, 1.0),
        _block_format("fp8_e4m3", "float", 8, 128, 448.0, exponent=4, mantissa=3),
        _block_format("fp8_e5m2", "float", 8, 128, 57344.0, exponent=5, mantissa=2),
        _block_format("mxfp8", "float", 8, 32, 448.0, exponent=4, mantissa=3),
        _block_format("mxfp4", "float", 4, 32, 6.0, exponent=2, mantissa=1),
        _block_format("nvfp4", "float", 4, 16, 6.0, exponent=2, mantissa=1, group=256),
    )
}


def get_format(name: str, *, block: int | None = None, scale: ScaleKind | None = None) -> Format:
    """The format `name`, with another block length or scale dtype if asked for.

    name: fp32, bf16, fp16, int8, int4, int2, sign, fp8_e4m3, fp8_e5m2, mxfp8, mxfp4 or nvfp4.
    block: elements that share a scale, a power of two from 16 to 4096; default 128 (mxfp8, mxfp4: 32; nvfp4: 16).
    scale: dtype of the scale, "fp32" or "bf16", where the format leaves a choice.
    Raises ValueError for an unknown name, block or scale. `block` and `scale` mean nothing to raw formats.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}")
    fmt = FORMATS[name]
    if fmt.kind == "raw":
        if block is not None or scale is not None:
            raise ValueError(f"format {name!r} is raw: it has no blocks and no scales; drop block= and scale=")
        return fmt
    block = fmt.block if block is None else block
    scaled = replace(fmt, block=block, scale=fmt.scale if scale is None else scale)
    return replace(scaled, group=max(fmt.group, block)) if fmt.group else scaled
