"""Formats: how a block of numbers becomes bits.

A format is a value, not a class per method. Every block format is the same five lines of arithmetic
(see `reference.py`) with other constants:

    s     = magnitude of the block (largest |x|, or mean |x| for sign), rounded to the scale's dtype
    t     = x * (max_code / s)                 in [-max_code, max_code]
    code  = t rounded to the nearest (or a random neighbouring) representable code
    x_hat = (code * (1 / max_code)) * s

The scale stores the magnitude and not the step, so the largest value of a block, and a block of ones, survive
exactly: fl(max_code * fl(1 / max_code)) == 1 in float32 for every max_code used here (a test holds this).

Codes of kind "levels" index a table (max_code is 1, and x_hat = level * s). Those for normally distributed numbers
(eden, lloyd) choose codes by the block's rms and s afterwards, so that it suits the codes; see `Format.fit`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from commq.codecs.levels import LLOYD_MAX, dynamic_tree, symmetric

Kind = Literal["raw", "integer", "float", "sign", "levels", "means", "spikes"]
Fit = Literal["largest", "unbiased", "least_squares"]
ScaleKind = Literal["none", "fp32", "bf16", "e8m0", "e4m3", "pair", "bf16x3", "fp32x3"]

FITS: tuple[Fit, ...] = ("largest", "unbiased", "least_squares")
SCALE_BYTES: dict[str, int] = {
    **{"none": 0, "fp32": 4, "bf16": 2, "e8m0": 1, "e4m3": 1, "pair": 4},
    **{"bf16x3": 8, "fp32x3": 16},
}

MIN_BLOCK, MAX_BLOCK = 16, 4096
MAX_SPIKES_BLOCK = 256
"""Places of kept values are one byte."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How B consecutive elements (a block) become codes and one scale."""

    name: str
    kind: Kind
    bits: int
    """Bits per code on the wire: 1, 2, 4, 8, 16 or 32; levels also 3; spikes 2 to 8."""
    max_code: float = 0.0
    """Largest magnitude of a code: 127 for int8, 448 for e4m3, 1 for sign; 0 for raw formats."""
    mantissa: int = 0
    """Explicit mantissa bits of a float code."""
    exponent: int = 0
    """Exponent bits of a float code; the bias is 2**(exponent - 1) - 1."""
    block: int = 16
    """Elements that share one scale: a power of two, 16..4096. Raw formats have no scale; theirs is unused."""
    scale: ScaleKind = "none"
    """dtype of a block's scale. Integer and fp8 scales in bf16 are rounded up: nothing clips. pair: two bf16.
    bf16x3, fp32x3: a scale, rounded up, and two kept values (see spikes.py)."""
    group: int = 0
    """Elements that share a second, fp32 scale above the e4m3 block scales (nvfp4); 0: there is none."""
    levels: tuple[float, ...] = ()
    """Kind "levels": what codes 0, 1, ... stand for, ascending from -1 to 1; at most 2**bits of them."""
    fit: Fit = "largest"
    """Kind "levels": largest: s is the block's largest |x|. Otherwise codes are those of x / (spread * rms of the
    block), with levels l, and s = sum(x**2) / sum(x * l) (unbiased: over random rotations the mean of x_hat is x;
    Vargaftik et al. 2022; random signs and a Hadamard transform are nearly one, unless one element dominates its run)
    or s = sum(x * l) / sum(l**2) (least_squares: less error, and shrunk).
    """
    spread: float = 0.0
    """The largest level in units of the block's rms; 0 if fit is largest."""

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
        if self.kind == "spikes" and self.block > MAX_SPIKES_BLOCK:
            raise ValueError(f"block={self.block} for format {self.name!r}: expected at most {MAX_SPIKES_BLOCK}")
        if self.kind == "levels":
            self._check_levels()
        allowed = SCALES.get(self.name, ("fp32", "bf16"))
        if self.scale not in allowed:
            raise ValueError(f"scale={self.scale!r} for format {self.name!r}: expected one of {', '.join(allowed)}")

    def _check_levels(self) -> None:
        levels = self.levels
        if not (2 <= len(levels) <= 1 << self.bits and list(levels) == sorted(set(levels))):
            raise ValueError(
                f"levels of format {self.name!r}: found {len(levels)}, expected 2 to {1 << self.bits} for codes of "
                f"{self.bits} bits, ascending and different"
            )
        if self.bits not in (1, 2, 3, 4, 8) or self.max_code != 1.0 or (levels[0], levels[-1]) != (-1.0, 1.0):
            raise ValueError(
                f"format {self.name!r}: bits={self.bits}, max_code={self.max_code}, levels from {levels[0]} to "
                f"{levels[-1]}; expected 1, 2, 3, 4 or 8 bits, max_code=1.0 and levels from -1 to 1"
            )
        even = len(levels) % 2 == 0 and levels == tuple(-level for level in reversed(levels))
        if (self.fit == "largest") != (self.spread == 0.0) or not (self.fit == "largest" or even):
            raise ValueError(
                f"format {self.name!r}: fit={self.fit!r} with spread={self.spread} and {len(levels)} levels; expected "
                "fit='largest' and spread=0, or a spread above 0 and as many negative levels as positive ones, no 0"
            )

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
        return self.name not in ("fp32", "fp16", "means") and self.fit == "largest"

    @property
    def integer_summable(self) -> bool:
        """Codes of several ranks may be added as integers if the ranks share the scale."""
        return self.kind in ("integer", "sign")

    @property
    def contraction(self) -> float:
        """A d with ||x - x_hat||**2 <= d * ||x||**2 for every block of normal numbers under nearest rounding.

        Every code nearest to its input is no farther than the code 0, and the largest element keeps at least
        0.9 of its energy; sign with the mean as scale loses 1 - (||x||_1 / ||x||_2)**2 / B of a block
        (Karimireddy et al. 2019, Lemma 8). fp16 overflows, so it promises nothing (1.0). Levels without 0 add
        their smallest magnitude to every element; with fit="unbiased" a block of one spike, which a rotation is there
        to prevent, may lose more than it has (d > 1).
        """
        if self.kind == "raw":
            return {"fp32": 0.0, "bf16": 2.0**-16, "fp16": 1.0}[self.name]
        if self.kind == "levels":
            smallest = min(abs(level) for level in self.levels)
            if self.fit == "unbiased":  # s <= |x|_2 / smallest
                return max(1.0, self.block / smallest**2)
            if self.fit == "least_squares":  # 1 - cos**2 of the angle between x and its levels
                return 1.0 - 0.9 * smallest**2 / self.block
            return 1.0 - 0.9 / self.block + self.block * smallest**2
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
    "means": ("pair",),
    **{f"spike{bits}": ("bf16x3", "fp32x3") for bits in range(2, 9)},
}
"""Scale dtypes each block format can have; the first is the default."""


def _block_format(name: str, kind: Kind, bits: int, block: int, max_code: float, **floats: Any) -> Format:
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


def _lloyd_format(name: str, bits: int, fit: Fit) -> Format:
    positive = LLOYD_MAX[bits]
    return Format(
        name=name, kind="levels", bits=bits, block=1024, max_code=1.0, scale="fp32", levels=symmetric(positive),
        fit=fit, spread=positive[-1],
    )  # fmt: skip


def level_format(name: str, bits: int, levels: tuple[float, ...], *, block: int = 128) -> Format:
    """A format whose codes index `levels`, scaled by the largest magnitude of each block.

    levels: 2 to 2**bits of them, ascending from -1 to 1; bits: 1, 2, 3, 4 or 8.
    """
    return Format(name=name, kind="levels", bits=bits, block=block, max_code=1.0, scale="fp32", levels=levels)


LEVEL_FORMATS: dict[str, Format] = {
    **{f"eden{bits}": _lloyd_format(f"eden{bits}", bits, "unbiased") for bits in LLOYD_MAX},
    **{f"lloyd{bits}": _lloyd_format(f"lloyd{bits}", bits, "least_squares") for bits in LLOYD_MAX},
    "alq3": level_format("alq3", 3, symmetric((1 / 3, 2 / 3, 1.0), zero=True)),
    "amq3": level_format("amq3", 3, symmetric((0.125, 0.25, 0.5, 1.0))),
    "dynamic8": level_format("dynamic8", 8, dynamic_tree()),
}
"""Formats of kind "levels" with names. Unlike those of FORMATS, eden and lloyd do not keep a block of ones exactly."""


MEANS = Format(name="means", kind="means", bits=1, block=256, max_code=1.0, scale="pair")
"""The sign of each number, decoded as the mean of the block's numbers of that sign (0 counts as positive): two bf16.

Source: Seide et al. 2014. In plain torch only: neither the native library nor Triton has it.
"""


SPIKE_FORMATS: dict[str, Format] = {
    f"spike{bits}": _block_format(f"spike{bits}", "spikes", bits, 128, float(2 ** (bits - 1) - 1))
    for bits in range(2, 9)
}
"""Integers of any width, by bit planes, with the two largest values of a block kept: for activations (spikes.py).

bf16x3 keeps values of bfloat16 exactly, and others to 2**-9 of themselves; fp32x3 keeps all of them. In plain torch and
Triton: the native library does not have them.
"""


def get_format(name: str, *, block: int | None = None, scale: ScaleKind | None = None) -> Format:
    """The format `name`, with another block length or scale dtype if asked for.

    name: fp32, bf16, fp16, int8, int4, int2, sign, fp8_e4m3, fp8_e5m2, mxfp8, mxfp4, nvfp4; eden1 to eden4, lloyd1
    to lloyd4 (which need a rotation), alq3, amq3, dynamic8, means, or spike2 to spike8.
    block: elements that share a scale, a power of two from 16 to 4096; default 128 (mxfp8, mxfp4: 32; nvfp4: 16; eden,
    lloyd: 1024).
    scale: dtype of the scale, "fp32" or "bf16" ("fp32x3" or "bf16x3" for spikes), where the format leaves a choice.
    Raises ValueError for an unknown name, block or scale. `block` and `scale` mean nothing to raw formats.
    """
    named = FORMATS | LEVEL_FORMATS | {"means": MEANS} | SPIKE_FORMATS
    if name not in named:
        raise ValueError(f"format {name!r} is unknown; expected one of {', '.join(named)}")
    fmt = named[name]
    if fmt.kind == "raw":
        if block is not None or scale is not None:
            raise ValueError(f"format {name!r} is raw: it has no blocks and no scales; drop block= and scale=")
        return fmt
    block = fmt.block if block is None else block
    scaled = replace(fmt, block=block, scale=fmt.scale if scale is None else scale)
    return replace(scaled, group=max(fmt.group, block)) if fmt.group else scaled
