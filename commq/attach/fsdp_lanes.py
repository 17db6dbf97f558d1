"""Lanes: how the shards of FSDP's rows become strips of a message, one lane for each format.

Blocks are aligned to parameters, so what is sent for a parameter does not depend on its neighbours, on which of them
have a gradient, or on what FSDP prefetches. Where all parameters in a format start and end at multiples of the unit,
and few others stand between them, the rows are encoded as they are; otherwise parameters are first copied to aligned
places. Padding there repeats the shard's last element where it matters: a run of equal numbers stays one, and survives
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from commq.attach.fsdp_layout import Shard
from commq.codecs.formats import Format

WASTE = 16
"""Rows are encoded as they are if at most one element in this many belongs to another lane."""


@dataclass(frozen=True)
class Lane:
    """Parameters that travel in one format."""

    format: Format
    answer: Format
    """Of a second hop, where there is one."""
    shards: tuple[Shard, ...]
    starts: tuple[int, ...]
    """Where each stands in FSDP's row."""
    places: tuple[int, ...]
    """Where each stands in the lane's row."""
    numel: int
    """Elements of the lane's row (C), a multiple of the unit."""
    in_place: bool
    """The lane's rows are FSDP's own."""
    unit: int
    fill: bool
    """Padding matters: a rotation mixes it in, sign's scale is a mean."""

    def take(self, rows: Tensor) -> Tensor:
        """(K, C) of FSDP's rows (K, R): all W, or the own one. May be the rows themselves."""
        if self.in_place:
            return rows
        lane = rows.new_zeros(len(rows), self.numel) if self._gaps else rows.new_empty(len(rows), self.numel)
        for shard, start, place in zip(self.shards, self.starts, self.places, strict=True):
            lane[:, place : place + shard.numel] = rows[:, start : start + shard.numel]
        if self.fill:
            self._repeat_last(lane)
        return lane

    def put(self, lane: Tensor, rows: Tensor, *, adds: bool = False) -> None:
        """Write (or add, in float32) the lane's rows into FSDP's."""
        if self.in_place:
            if lane.data_ptr() != rows.data_ptr():
                rows.copy_(rows.float() + lane if adds else lane)
            return
        for shard, start, place in zip(self.shards, self.starts, self.places, strict=True):
            there, here = rows[:, start : start + shard.numel], lane[:, place : place + shard.numel]
            there.copy_(there.float() + here if adds else here)

    def padded(self, shard: Shard) -> int:
        """Elements that a shard takes in the lane's row, padding included."""
        return -(-shard.numel // self.unit) * self.unit

    def clear_gaps(self, residual: Tensor) -> None:
        """Zero the padding of a residual of (K * C,): it is no parameter's, so it is not saved.

        Zeros that travel as zeros lose nothing; repeated elements do, and zeros where no level is 0.
        """
        if self.in_place or not (self.fill or (self.format.kind == "levels" and 0.0 not in self.format.levels)):
            return
        rows = residual.view(-1, self.numel)
        for shard, place in zip(self.shards, self.places, strict=True):
            if shard.numel % self.unit:
                rows[:, place + shard.numel : place + self.padded(shard)] = 0

    @property
    def _gaps(self) -> bool:
        return sum(shard.numel for shard in self.shards) != self.numel

    def _repeat_last(self, lane: Tensor) -> None:
        for shard, place in zip(self.shards, self.places, strict=True):
            end = place + self.padded(shard)
            for row, valid in enumerate(shard.valid if len(lane) > 1 else ()):
                if 0 < valid < end - place:
                    lane[row, place + valid : end] = lane[row, place + valid - 1]
            if len(lane) == 1:
                lane[0, place + shard.numel : end] = lane[0, place + shard.numel - 1]


def make_lanes(
    shards: Sequence[Shard], formats: Sequence[tuple[Format, Format]], *, unit: int, fill: bool
) -> list[Lane]:
    """Lanes of FSDP's rows that hold `shards`, one after the other; those that are encoded first.

    formats: of each shard, both hops'. unit: elements of encoded ones that must stay together. fill: see Lane.
    """
    starts, row_numel = [], 0
    for shard in shards:
        starts.append(row_numel)
        row_numel += shard.numel
    lanes = []
    for fmt, answer in sorted(dict.fromkeys(formats), key=lambda pair: pair[0].kind == "raw"):
        members = [i for i, pair in enumerate(formats) if pair == (fmt, answer) and shards[i].numel]
        if members:
            raw = fmt.kind == "raw"
            own, places = tuple(shards[i] for i in members), tuple(starts[i] for i in members)
            lanes.append(_lane(fmt, answer, own, places, 1 if raw else unit, row_numel, fill and not raw))
    return lanes


def _lane(
    fmt: Format,
    answer: Format,
    shards: tuple[Shard, ...],
    starts: tuple[int, ...],
    unit: int,
    row_numel: int,
    fill: bool,
) -> Lane:
    numel = sum(shard.numel for shard in shards)
    whole = all(s.numel % unit == 0 and start % unit == 0 for s, start in zip(shards, starts, strict=True))
    whole = whole and row_numel % unit == 0 and not (fill and not all(s.even for s in shards))
    if whole and (row_numel - numel) * WASTE <= row_numel and (fmt.kind != "raw" or numel == row_numel):
        return Lane(fmt, answer, shards, starts, starts, row_numel, True, unit, fill)
    places, end = [], 0
    for shard in shards:
        places.append(end)
        end += -(-shard.numel // unit) * unit
    return Lane(fmt, answer, shards, starts, tuple(places), end, False, unit, fill)


def split(lanes: Sequence[Lane], flat: Tensor, world_size: int) -> list[Tensor]:
    """Each lane's rows, flat, of FSDP's flat rows."""
    rows = flat.view(world_size, -1)
    return [lane.take(rows).view(-1) for lane in lanes]


def empty(lane: Lane, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a lane's rows are decoded to: FSDP's own if they are in place and of this dtype, else fresh memory."""
    if lane.in_place and rows.dtype == dtype:
        return rows
    return torch.empty(len(rows), lane.numel, dtype=dtype, device=rows.device)
