"""Formats of an optimizer's moments: how a block of a moment becomes 8- or 4-bit codes and one float32 scale.

    s      = largest magnitude of the block
    code   = number of the level nearest to |x| / s (a tie goes to the one above), and above it the sign, if any
    x_hat  = level * s, and its sign

The largest magnitude survives exactly and a block of zeros stays zero. A block that holds a NaN or an infinity decodes
to NaN. Shapes: G blocks of B elements, P bytes of codes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commq.codecs import scales
from commq.codecs.formats import get_format
from commq.codecs.levels import dynamic_tree
from commq.codecs.rounding import code_values
from commq.codecs.wire import pack, unpack

_INF = 0x7F800000
_SHIFT = 15
"""Bits of a float32 that are dropped to look a code up: 8 of the mantissa stay."""


@dataclass(frozen=True, kw_only=True)
class MomentFormat:
    """Magnitudes that codes can have, and how many elements share a scale."""

    name: str
    bits: int
    """Bits of a code: 8 or 4."""
    block: int
    """Elements that share a scale: a power of two."""
    signed: bool
    """The highest bit of a code is the sign."""
    levels: tuple[float, ...]
    """Magnitudes from smallest to largest, which is 1; at most 2**(bits - signed)."""
    lowest: int = 0
    """Smallest code that is written. 1 keeps a level 0 out of use: what is divided by must not become zero."""

    def __post_init__(self) -> None:
        count = 1 << (self.bits - self.signed)
        if self.bits not in (4, 8) or self.block < 16 or self.block & (self.block - 1):
            raise ValueError(
                f"moment format {self.name!r}: bits={self.bits}, block={self.block}; expected 4 or 8 bits and a power "
                "of two from 16"
            )
        if not 2 <= len(self.levels) <= count or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(
                f"moment format {self.name!r}: {len(self.levels)} levels; expected 2 to {count}, all different, "
                "ascending"
            )
        if self.levels[0] < 0.0 or self.levels[-1] != 1.0 or not 0 <= self.lowest < len(self.levels):
            raise ValueError(
                f"moment format {self.name!r}: levels {self.levels[0]} to {self.levels[-1]}, lowest={self.lowest}; "
                "expected levels from 0 or above to 1, and lowest the number of one"
            )

    @property
    def magnitude_bits(self) -> int:
        """Bits of a code without its sign."""
        return self.bits - self.signed

    def code_bytes(self, width: int) -> int:
        """Bytes of the codes of `width` elements."""
        return -(-width * self.bits // 8)

    def blocks(self, width: int) -> int:
        """Blocks, and so scales, of a row of `width` elements; the last may be shorter."""
        return -(-width // self.block)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """float32: what every code's magnitude stands for, and the edges above them; padded with 1 and infinity."""
        found: tuple[Tensor, Tensor] | None = self.__dict__.get(f"tables on {device}")  # hashing levels takes longer
        if found is None:
            found = self.__dict__[f"tables on {device}"] = _tables(self.levels, 1 << self.magnitude_bits, device)
        return found


def _tables(levels: tuple[float, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor(levels, dtype=torch.float32)
    edges = (values[:-1] + values[1:]) * 0.5
    missing = count - len(values)
    values = torch.cat((values, torch.ones(missing)))
    edges = torch.cat((edges, torch.full((missing + 1,), float("inf"))))
    return values.to(device), edges.to(device)


@functools.cache
def _below(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """int32: for each pattern of a float32's upper bits, up to that of 1, how many edges lie at or below its smallest.

    One more may lie inside it, no more: so the code follows from one comparison. (A binary search takes ten times as
    long on a CPU.)
    """
    values = torch.tensor(levels, dtype=torch.float32)
    edges = (values[:-1] + values[1:]) * 0.5
    first = torch.arange((0x3F800001 >> _SHIFT) + 2, dtype=torch.int32) << _SHIFT
    counts = torch.searchsorted(edges, first.view(torch.float32), right=True).to(torch.int32)
    if (counts.diff() > 1).any():
        raise ValueError(f"levels closer than {2.0 ** (_SHIFT - 23):g} of their size: {len(levels)} levels")
    return counts.to(device)


def encode(x_GB: Tensor, fmt: MomentFormat) -> tuple[Tensor, Tensor]:
    """Codes uint8 (G, P) and scales float32 (G,) of float32 blocks; what is shorter is padded with zeros.

    Error: |x - x_hat| <= half the gap between the levels around |x| / s, times s; below the level `lowest`, up to it.
    """
    _, edges = fmt.tables(x_GB.device)
    bits_G = scales.magnitude_bits(x_GB).amax(dim=-1)
    marked_G = bits_G >= _INF
    amax_G = scales.as_float(bits_G.masked_fill(marked_G, 0))
    up_G = scales.lift(amax_G)
    inverse_G = torch.where(amax_G > 0, scales.quotient(1.0, amax_G * up_G), 0.0)
    t_GB = ((x_GB.abs() * up_G[:, None]) * inverse_G[:, None]).masked_fill(marked_G[:, None], 0.0)
    key_GB = t_GB.view(torch.int32) >> _SHIFT
    codes_GB = _below(fmt.levels, x_GB.device)[key_GB]
    codes_GB = (codes_GB + (t_GB >= edges[codes_GB])).clamp(fmt.lowest, len(fmt.levels) - 1)
    if fmt.signed:
        codes_GB = codes_GB | ((x_GB < 0).to(torch.int32) << fmt.magnitude_bits)
    return pack(codes_GB, fmt.bits), amax_G.masked_fill(marked_G, float("nan"))


def decode(codes_GP: Tensor, scales_G: Tensor, fmt: MomentFormat) -> Tensor:
    """float32 (G, B) of what `encode` returned. Any bytes decode."""
    values, _ = fmt.tables(codes_GP.device)
    codes_GB = unpack(codes_GP, fmt.bits).to(torch.int64)
    x_GB = values[codes_GB & (len(values) - 1)] * scales_G[:, None]
    return torch.where(codes_GB >> fmt.magnitude_bits != 0, -x_GB, x_GB) if fmt.signed else x_GB


def _fraction_tree(bits: int) -> tuple[float, ...]:
    """Positive values of the dynamic tree type with all its bits for magnitudes: 0.45 * 10**-(bits - 1) to 1."""
    found = []
    for zeros in reversed(range(bits)):
        steps = 1 << (bits - 1 - zeros)
        found += [(0.1 + 0.9 * (i + 0.5) / steps) / 10**zeros for i in range(steps)]
    return (*found[:-1], 1.0)


def _e4m3() -> tuple[float, ...]:
    """The magnitudes of e4m3 by their bit patterns, 0 to 448, divided by the largest."""
    values = code_values(torch.arange(127, dtype=torch.uint8), get_format("fp8_e4m3")).tolist()
    return tuple(value / values[-1] for value in values)


FIRST_8 = MomentFormat(
    name="dynamic8", bits=8, block=256, signed=True, levels=tuple(x for x in dynamic_tree() if x >= 0)
)
"""Dettmers et al., "8-bit optimizers via block-wise quantization" (2021): block-wise dynamic tree codes."""
ROOT_8 = MomentFormat(name="dynamic8-root", bits=8, block=256, signed=False, levels=_fraction_tree(8))
FIRST_4 = MomentFormat(
    name="dynamic4",
    bits=4,
    block=128,
    signed=True,
    levels=(0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 1.0),
)
"""Dynamic exponent levels of Li, Chen, Zhu, "Memory efficient optimizers with 4-bit states" (2023)."""
ROOT_4 = MomentFormat(
    name="linear4-root", bits=4, block=128, signed=False, levels=tuple((i + 1) / 16 for i in range(16))
)
"""Linear without zero, as there; of the root of the second moment, whose range is the first moment's."""
ROOT_4_ZERO = replace(ROOT_4, name="linear4-zero", levels=tuple((i / 15) ** 0.5 for i in range(16)))
"""Second moments that are linear with a zero point: small ones become 0, and their elements take steps that are far too
large. A control that must fail."""
FIRST_FP8 = MomentFormat(name="e4m3", bits=8, block=256, signed=True, levels=_e4m3())
"""Codes are e4m3 bit patterns."""
ROOT_FP8 = replace(FIRST_FP8, name="e4m3-root", signed=False, lowest=1)
