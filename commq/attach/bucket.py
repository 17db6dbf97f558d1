"""Buckets: how the gradients of several parameters become one message.

A bucket's parameters are sorted into groups by the formats they travel in. Blocks are aligned to parameters, so the
numbers sent for a parameter do not depend on the bucket it stands in (DDP rebuilds its buckets, and a resumed job
starts with other ones). Where one format is all there is, and every parameter but the last is a whole number of units
long, the bucket is encoded as it stands; otherwise parameters are first copied to aligned places.

Parameters with raw formats, exempt ones, are gathered element by element into groups of their own, of the same
message. In a bucket encoded as it stands they are zeroed after they were taken out: they cost a few codes but no copy
of the bucket, and disturb no block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commq.attach.answer_residual import AnswerResidual
from commq.codecs.formats import Format
from commq.codecs.reference import Blocks, Coding
from commq.codecs.wire import Layout
from commq.collectives.message import Operand
from commq.collectives.plan import Plan, Source, make_plan
from commq.collectives.route import inside_format
from commq.feedback.residual import Residual, Segment, Stored
from commq.recipe import Recipe


@dataclass(frozen=True)
class Member:
    """A parameter's place in a bucket."""

    name: str
    offset: int
    numel: int
    format: Format
    answer: Format
    first_unit: int
    """Number of its first unit, counted over the whole model: where its random bits start."""
    live: Tensor | None = None
    """int64: its elements that travel, `numel` of them; None: all."""


@dataclass(frozen=True)
class Raw:
    """Parameters that travel uncoded."""

    index: Tensor
    """int64: their elements' places in DDP's buffer."""

    def gather(self, buffer: Tensor) -> Tensor:
        return buffer[self.index]

    def scatter(self, buffer: Tensor, x_N: Tensor) -> None:
        buffer[self.index] = x_N

    def operand(self, x_N: Tensor, coding: Coding, decay: float) -> Operand:
        return Operand(x_N, x_N, Coding())


@dataclass(frozen=True)
class Coded:
    """Parameters that are encoded, in one pair of formats."""

    numel: int
    starts: tuple[int, ...]
    """Where each parameter starts in DDP's buffer; `segments` are their aligned places."""
    segments: tuple[Segment, ...]
    in_place: bool
    """The aligned places are those of DDP's own buffer."""
    residual: Stored | None
    padding: Tensor | None
    """int64: places of the residual that belong to no parameter and could take a value; they are kept at zero."""
    blocks: Blocks | None
    answer_blocks: Blocks | None
    answer_residual: Tensor | None = None
    lives: tuple[Tensor | None, ...] = ()
    """For each segment, the places in DDP's buffer of the elements that travel; None: all from `starts` on."""

    def residuals(self) -> list[Tensor]:
        """All tensors of feedback."""
        own = (self.residual.values, self.residual.scales) if self.residual else ()
        return [tensor for tensor in (*own, self.answer_residual) if tensor is not None]

    def gather(self, buffer: Tensor) -> Tensor:
        if self.in_place:
            return buffer
        aligned = buffer.new_zeros(self.numel)
        for start, s, live in zip(self.starts, self.segments, self.lives, strict=True):
            aligned[s.offset : s.offset + s.numel] = buffer[start : start + s.numel] if live is None else buffer[live]
        return aligned

    def scatter(self, buffer: Tensor, x_N: Tensor) -> None:
        if not self.in_place:
            for start, s, live in zip(self.starts, self.segments, self.lives, strict=True):
                here = slice(start, start + s.numel) if live is None else live
                buffer[here] = x_N[s.offset : s.offset + s.numel]
        if self.residual is not None and self.padding is not None:
            self.residual.values[self.padding] = 0

    def operand(self, x_N: Tensor, coding: Coding, decay: float) -> Operand:
        return Operand(
            x_N,
            x_N,
            coding,
            blocks=self.blocks,
            answer_blocks=self.answer_blocks,
            residual_N=self.residual.values if self.residual else None,
            residual_scales_G=self.residual.scales if self.residual else None,
            decay=decay,
            answer_residual=self.answer_residual,
        )


@dataclass(frozen=True)
class Bucket:
    """Everything about one bucket that does not change from step to step."""

    sources: tuple[Source, ...]
    """One for each group."""
    groups: tuple[Coded | Raw, ...]

    def gather(self, buffer: Tensor) -> list[Tensor]:
        """The tensors of all groups. May overwrite the buffer."""
        raw = {i: group.gather(buffer) for i, group in enumerate(self.groups) if isinstance(group, Raw)}
        if any(isinstance(group, Coded) and group.in_place for group in self.groups):
            for i in raw:
                self.groups[i].scatter(buffer, buffer.new_zeros(()))
        return [raw[i] if i in raw else group.gather(buffer) for i, group in enumerate(self.groups)]

    def scatter(self, buffer: Tensor, tensors: list[Tensor]) -> None:
        """Undo `gather` after the exchange. Coded groups first: one of them may be the buffer."""
        pairs = list(zip(self.groups, tensors, strict=True))
        for kind in (Coded, Raw):
            for group, x_N in pairs:
                if isinstance(group, kind):
                    group.scatter(buffer, x_N)


def make_bucket(
    members: list[Member], recipe: Recipe, residual: Residual, *, world_size: int, buffer: Tensor, two_levels: bool
) -> Bucket:
    """Lay out the bucket that holds `members` in `buffer` (1-D, float32, bfloat16 or float16).

    two_levels: there is a format of its own between ranks of one host.
    """
    formats = dict.fromkeys((m.format, m.answer) for m in members if m.numel)
    coded = [pair for pair in formats if pair[0].kind != "raw"]
    if len(formats) == 1 and not coded:
        ((fmt, answer),) = formats
        source = Source(buffer.numel(), buffer.dtype, fmt, answer, whole=recipe.rounding == "stochastic")
        return Bucket((source,), (Coded(buffer.numel(), (), (), True, None, None, None, None),))
    sources: list[Source] = []
    groups: list[Coded | Raw] = []
    for pair in (*coded, *(pair for pair in formats if pair not in coded)):
        own = [m for m in members if m.numel and (m.format, m.answer) == pair]
        if pair in coded:
            source, group = _code(own, recipe, residual, len(coded) == 1, two_levels, world_size, buffer)
            groups.append(group)
        else:
            index = torch.cat([torch.arange(m.offset, m.offset + m.numel, device=buffer.device) for m in own])
            source = Source(len(index), buffer.dtype, *pair)
            groups.append(Raw(index))
        sources.append(source)
    return Bucket(tuple(sources), tuple(groups))


def _code(
    members: list[Member],
    recipe: Recipe,
    residual: Residual,
    alone: bool,
    two_levels: bool,
    world_size: int,
    buffer: Tensor,
) -> tuple[Source, Coded]:
    """A group of parameters in one pair of formats; alone: all that is encoded in this bucket."""
    unit, device, fmt, answer = recipe.unit, buffer.device, members[0].format, members[0].answer
    feeds_back = recipe.feedback.rule != "none"
    # A rotation and sign codes send something for padding, too. Its residual must not depend on the bucket.
    leaks = feeds_back and (recipe.rotation is not None or fmt.kind == "sign")
    in_place = alone and all(
        m.live is None and m.offset % unit == 0 and not (leaks and m.numel % unit) for m in members
    )
    segments, end = [], 0
    for m in members:
        segments.append(Segment(m.name, m.offset if in_place else end, m.numel))
        end += -(-m.numel // unit) * unit
    numel = buffer.numel() if in_place else end
    inside = (recipe.inside or inside_format(fmt)) if two_levels else None
    whole = recipe.rounding == "stochastic" and "raw" in (answer.kind, inside.kind if inside else "")
    source = Source(numel, buffer.dtype, fmt, answer, unit, inside, whole)
    group = Coded(
        numel,
        tuple(m.offset for m in members),
        tuple(segments),
        in_place,
        residual=None,
        padding=None,
        blocks=None,
        answer_blocks=None,
        lives=tuple(None if m.live is None else m.live + m.offset for m in members),
    )
    part = make_plan((source,), world_size=world_size).parts[0]
    if part.layout.format.kind == "raw":
        return source, group
    if feeds_back:
        padding = _find_padding(segments, numel, device) if leaks else None
        group = replace(group, residual=residual.bind(segments, numel, device), padding=padding)
    if recipe.rounding == "stochastic" or "sign" in (part.layout.format.kind, part.answer.format.kind):
        first_units = [m.first_unit for m in members]
        tables, answer_tables = (
            _number_blocks(segments, first_units, layout, unit, device) for layout in (part.layout, part.answer)
        )
        group = replace(group, blocks=tables, answer_blocks=answer_tables)
    return source, group


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


def bind_answers(
    bucket: Bucket, plans: Sequence[Plan], residual: AnswerResidual, unit: int, device: torch.device
) -> Bucket:
    """The bucket with buffers for the feedback of the second hop."""
    groups = tuple(
        replace(group, answer_residual=residual.bind(plans, i, group.segments, unit, device))
        if isinstance(group, Coded) and group.segments
        else group
        for i, group in enumerate(bucket.groups)
    )
    return replace(bucket, groups=groups)
