"""Buckets: how the gradients of several parameters become one message.

Blocks are aligned to parameters, so the numbers sent for a parameter do not depend on the bucket it stands in (DDP
rebuilds its buckets, and a resumed job starts with other ones). Where every parameter but the last is a whole number
of units long, the bucket is encoded as it stands; otherwise its parameters are first copied to aligned places.

Exempt elements form a second, raw part of the same message. In a bucket encoded as it stands they are zeroed
after they were taken out: they cost a few codes but no copy of the bucket, and disturb no block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commq.codecs.reference import Blocks
from commq.codecs.wire import Layout
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.plan import Plan, Source, make_plan, make_plans
from commq.feedback.residual import Residual, Segment, Stored
from commq.recipe import Recipe


@dataclass(frozen=True)
class Member:
    """A parameter's place in a bucket."""

    name: str
    offset: int
    numel: int
    exempt: bool
    first_unit: int
    """Number of its first unit, counted over the whole model: where its random bits start."""


@dataclass(frozen=True)
class Bucket:
    """Everything about one bucket that does not change from step to step."""

    plans: tuple[Plan, ...]
    """Of the pieces that it travels in."""
    coded: tuple[tuple[int, Segment], ...]
    """Parameters that are encoded: where each starts in DDP's buffer, and its aligned place."""
    coded_numel: int
    in_place: bool
    """The aligned places are those of DDP's own buffer."""
    exempt_index: Tensor | None
    """int64: places of exempt elements in DDP's buffer."""
    residual: Stored | None
    residual_padding: Tensor | None
    """int64: places of the residual that belong to no parameter and could take a value; they are kept at zero."""
    blocks: Blocks | None
    answer_blocks: Blocks | None

    def gather(self, buffer: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(elements to encode, exempt elements) of a bucket; either may be missing. May overwrite the buffer."""
        exempt = None if self.exempt_index is None else buffer[self.exempt_index]
        if not self.coded:
            return None, exempt
        if self.in_place:
            if self.exempt_index is not None:
                buffer[self.exempt_index] = 0
            return buffer, exempt
        aligned = buffer.new_zeros(self.coded_numel)
        for start, s in self.coded:
            aligned[s.offset : s.offset + s.numel] = buffer[start : start + s.numel]
        return aligned, exempt

    def scatter(self, buffer: Tensor, aligned: Tensor | None, exempt: Tensor | None) -> None:
        """Undo `gather` after the exchange."""
        if aligned is not None and not self.in_place:
            for start, s in self.coded:
                buffer[start : start + s.numel] = aligned[s.offset : s.offset + s.numel]
        if exempt is not None:
            buffer[self.exempt_index] = exempt


def make_bucket(
    members: list[Member], recipe: Recipe, residual: Residual, *, world_size: int, buffer: Tensor
) -> Bucket:
    """Lay out the bucket that holds `members` in `buffer` (1-D, float32, bfloat16 or float16)."""
    device, unit = buffer.device, recipe.unit
    coded = [m for m in members if not m.exempt]
    exempt = [m for m in members if m.exempt]
    # A rotation and sign codes send something for padding, too. Its residual must not depend on the bucket.
    leaks = recipe.feedback.rule != "none" and (recipe.rotation is not None or recipe.format.kind == "sign")
    in_place = all(m.offset % unit == 0 and not (leaks and m.numel % unit) for m in coded)
    segments, end = [], 0
    for m in coded:
        segments.append(Segment(m.name, m.offset if in_place else end, m.numel))
        end += -(-m.numel // unit) * unit
    coded_numel = buffer.numel() if in_place else end
    sources = [Source(coded_numel, buffer.dtype, recipe.format, recipe.answer_format, unit)] if coded else []
    index = None
    if exempt:
        raw = recipe.exempt.format
        sources.append(Source(sum(m.numel for m in exempt), buffer.dtype, raw, raw))
        index = torch.cat([torch.arange(m.offset, m.offset + m.numel, device=device) for m in exempt])
    plan = make_plan(tuple(sources), world_size=world_size)
    piece_bytes = PIECE_BYTES[device.type]
    stored = padding = tables = answer_tables = None
    if coded and plan.parts[0].layout.format.kind != "raw":
        part = plan.parts[0]
        if recipe.feedback.rule != "none":
            stored = residual.bind(segments, coded_numel, device)
            padding = _find_padding(segments, coded_numel, device) if leaks else None
        if recipe.rounding == "stochastic" or "sign" in (part.layout.format.kind, part.answer.format.kind):
            first_units = [m.first_unit for m in coded]
            tables = _number_blocks(segments, first_units, part.layout, unit, device)
            answer_tables = _number_blocks(segments, first_units, part.answer, unit, device)
    return Bucket(
        plans=make_plans(tuple(sources), world_size=world_size, piece_bytes=piece_bytes),
        coded=tuple(zip((m.offset for m in coded), segments, strict=True)),
        coded_numel=coded_numel,
        in_place=in_place,
        exempt_index=index,
        residual=stored,
        residual_padding=padding,
        blocks=tables,
        answer_blocks=answer_tables,
    )


def _find_padding(segments: list[Segment], numel: int, device: torch.device) -> Tensor | None:
    """Places in [0, numel) that belong to no segment; None if there are none."""
    free = torch.ones(numel, dtype=torch.bool)
    for s in segments:
        free[s.offset : s.offset + s.numel] = False
    return free.nonzero().flatten().to(device) if bool(free.any()) else None


def _number_blocks(
    segments: list[Segment], first_units: list[int], layout: Layout, unit: int, device: torch.device
) -> Blocks:
    """Number of every block in the model, and how many elements of it are not padding."""
    block = layout.format.block
    ids = torch.zeros(layout.chunks * layout.chunk_blocks, dtype=torch.int64)
    valid = torch.zeros(layout.chunks * layout.chunk_blocks, dtype=torch.int32)
    for s, first_unit in zip(segments, first_units, strict=True):
        count = -(-s.numel // block)
        here = slice(s.offset // block, s.offset // block + count)
        steps = torch.arange(count)
        ids[here] = first_unit * (unit // block) + steps
        valid[here] = (s.numel - steps * block).clamp(max=block).to(torch.int32)
    return Blocks(ids.to(device), valid.to(device))
