"""Tables of levels: what the codes of a format of kind "levels" stand for, ascending from -1 to 1."""

from __future__ import annotations

LLOYD_MAX: dict[int, tuple[float, ...]] = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (0.128395030, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571),
}
"""Positive levels of least squared error for a normal variable of deviation 1, by bits; the rest are their negatives.

Each level is the mean of what rounds to it (a test holds that). Source: Max, "Quantizing for minimum distortion", 1960.
"""


def symmetric(positive: tuple[float, ...], zero: bool = False) -> tuple[float, ...]:
    """The table of `positive` levels (ascending), divided by the largest, their negatives, and perhaps 0."""
    top = positive[-1]
    upper = tuple(level / top for level in positive)
    return (*(-level for level in reversed(upper)), *((0.0,) if zero else ()), *upper)


def dynamic_tree() -> tuple[float, ...]:
    """255 values of the signed 8-bit dynamic tree type: 0 and +-fraction * 10**-zeros.

    After the sign, a run of `zeros` zeros is the exponent and a one ends it; the bits that are left, 6 - zeros, are a
    linear fraction of (0.1, 1), each value in the middle of its step. The largest, 0.993, is 1 here, so that a block's
    largest magnitude survives with either sign (published tables have 1 as a 256th value, and no -1).
    Source: Dettmers 2015, section 2.1.
    """
    upper = []
    for zeros in reversed(range(7)):
        steps = 1 << (6 - zeros)
        upper += [(0.1 + 0.9 * (i + 0.5) / steps) / 10**zeros for i in range(steps)]
    return symmetric((*upper[:-1], 1.0), zero=True)
