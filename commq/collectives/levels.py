"""Levels and fields: what integer_sum adds, and how sums share the words of a library's all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from commq.codecs import rounding


@dataclass(frozen=True)
class Table:
    """Levels that a rank may send, of the grid 0..g of sums: increasing integers from 0 to g.

    Near zero, where most elements are, they can lie closer. What that brings depends on who adds: where a switch or a
    server looks levels up, a rank sends only the index (4 bits for 16 levels), as in THC. Here the library adds, and
    fields are as wide as if all levels 0..g were sent; that uniform grid errs less. Mean square error of normal
    numbers in blocks of 128, stochastic, relative to their square: the table to 30 0.022, 16 even levels 0.024, all 31
    levels 0.006. So the table is here to reproduce THC, and for transports that look levels up.
    THC shares one norm among all blocks and cuts off what is beyond a quantile; here each block has its largest |x| as
    its scale, because one norm serves blocks of different magnitudes poorly. So nothing is cut off.
    """

    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or self.levels[0] != 0 or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"Table: levels {self.levels}, expected increasing integers that start at 0")

    @property
    def top(self) -> int:
        return self.levels[-1]

    @property
    def index_bits(self) -> int:
        """Bits of a level's index."""
        return (len(self.levels) - 1).bit_length()

    def round(self, y: Tensor, random: Tensor | None) -> Tensor:
        """int64 levels next to float32 y in [0, g]: the nearest (a tie goes down), or by chance and unbiased."""
        levels = torch.tensor(self.levels, device=y.device)
        above = torch.bucketize(y, levels.to(torch.float32)).clamp(1, len(self.levels) - 1)
        low, high = levels[above - 1], levels[above]
        share = (y - low) / (high - low)
        up = share > 0.5 if random is None else share + rounding.offset(random) >= 1.0
        return torch.where(up, high, low)


THC_TABLES: dict[int, Table] = {
    4: Table((0, 3, 5, 7, 9, 11, 13, 14, 16, 17, 19, 21, 23, 25, 27, 30)),
    3: Table((0, 3, 5, 7, 9, 11, 13, 16)),
}
"""Those of THC's code, by bits of the index: solved for a normal distribution cut off at 2.15 and 2.42 deviations."""


@dataclass(frozen=True)
class Fields:
    """How the sums over `world_size` ranks of levels 0..`top` share int32 words: integers only."""

    world_size: int
    top: int

    def __post_init__(self) -> None:
        if not self.lanes:
            raise ValueError(
                f"integer_sum: {self.world_size} ranks with levels 0..{self.top} sum to {self.world_size * self.top}, "
                "which does not fit an int32; use fewer levels or schedule two_shot"
            )

    @property
    def bits(self) -> int:
        """Bits of a field (f): the largest sum just fits."""
        return (self.world_size * self.top).bit_length()

    @cached_property
    def lanes(self) -> int:
        """Fields of a word (L)."""
        lanes = 32 // self.bits
        # All 32 bits serve, as words are centred; an odd `top` may miss the middle by one and cost a field.
        return lanes if self.world_size * self._centre(lanes) <= 1 << 31 else lanes - 1

    @cached_property
    def centre(self) -> int:
        """What each rank subtracts from its word, so that sums lie on both sides of 0 and in [-2**31, 2**31)."""
        return self._centre(self.lanes)

    def _centre(self, lanes: int) -> int:
        return (sum(self.top << (self.bits * lane) for lane in range(lanes)) + 1) // 2

    def words(self, numel: int) -> int:
        """Words of `numel` levels (V)."""
        return -(-numel // self.lanes)

    def pack(self, levels_C: Tensor) -> Tensor:
        """int32 (V,) of levels in [0, top]: word v holds levels v, v + V, v + 2 V, ... from the low bits on."""
        words = self.words(levels_C.numel())
        padding = self.lanes * words - levels_C.numel()
        levels_LV = torch.nn.functional.pad(levels_C.to(torch.int64), (0, padding)).view(self.lanes, words)
        return ((levels_LV << self._shifts(levels_C.device)).sum(dim=0) - self.centre).to(torch.int32)

    def unpack(self, sums_V: Tensor, numel: int) -> Tensor:
        """int64 (numel,), in [0, W * top]: the sums of levels, of a sum over all ranks of `pack`."""
        sums_V = sums_V.to(torch.int64) + self.world_size * self.centre
        return ((sums_V >> self._shifts(sums_V.device)) & ((1 << self.bits) - 1)).view(-1)[:numel]

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.arange(self.lanes, device=device)[:, None] * self.bits
