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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commq.attach.answer_residual import AnswerResidual
from commq.codecs.formats import Format
from commq.codecs.reference import Blocks, Coding
from commq.codecs.wire import Layout
from commq.collectives.message import Message, Operand, make_messages
from commq.collectives.plan import Plan, Source, make_plan
from commq.collectives.route import inside_format
from commq.collectives.transport import Transport
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

    runs: tuple[tuple[int, int], ...]
    """Start and length of each run of their elements in DDP's buffer."""

    def lay(self, buffer: Tensor) -> RawTensors:
        views = [buffer[start : start + numel] for start, numel in self.runs]
        x_N = buffer.new_empty(sum(numel for _, numel in self.runs))
        return RawTensors(x_N, views, list(x_N.split([numel for _, numel in self.runs])))

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
    residual: Stored | None = None
    padding: Tensor | None = None
    """int64: places of the residual that belong to no parameter and could take a value; they are kept at zero."""
    blocks: Blocks | None = None
    answer_blocks: Blocks | None = None
    answer_residual: Tensor | None = None
    lives: tuple[Tensor | None, ...] = ()
    """For each segment, the places in DDP's buffer of the elements that travel; None: all from its start on."""

    def residuals(self) -> list[Tensor]:
        """All tensors of feedback."""
        own = (self.residual.values, self.residual.scales) if self.residual else ()
        return [tensor for tensor in (*own, self.answer_residual) if tensor is not None]

    def lay(self, buffer: Tensor) -> CodedTensors:
        tensors = CodedTensors(buffer if self.in_place else buffer.new_empty(self.numel), [], [], [], buffer, self)
        for start, s, live in () if self.in_place else zip(self.starts, self.segments, self.lives, strict=True):
            place = tensors.x_N[s.offset : s.offset + s.numel]
            if live is None:
                tensors.views.append(buffer[start : start + s.numel])
                tensors.places.append(place)
            else:
                tensors.picked.append((live, place))
        return tensors

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
class RawTensors:
    """A raw group in a buffer: what is sent, the runs in DDP's buffer, and the same runs in what is sent."""

    x_N: Tensor
    views: list[Tensor]
    places: list[Tensor]

    def gather(self, clear: bool) -> None:
        torch._foreach_copy_(self.places, self.views)
        if clear:
            torch._foreach_zero_(self.views)

    def scatter(self) -> None:
        torch._foreach_copy_(self.views, self.places)


@dataclass(frozen=True)
class CodedTensors:
    """The same of a coded group; nothing to copy in place.

    A copy has memory from `gather` to `scatter` only, so that the views of it serve in every step.
    """

    x_N: Tensor
    views: list[Tensor]
    places: list[Tensor]
    picked: list[tuple[Tensor, Tensor]]
    """Where only some elements travel: their places in DDP's buffer, and in what is sent."""
    buffer: Tensor
    group: Coded

    def gather(self) -> None:
        if not self.group.in_place:
            self.x_N.untyped_storage().resize_(self.x_N.nbytes)
            self.x_N.zero_()
        if self.places:
            torch._foreach_copy_(self.places, self.views)
        for live, place in self.picked:
            torch.index_select(self.buffer, 0, live, out=place)

    def scatter(self) -> None:
        if self.places:
            torch._foreach_copy_(self.views, self.places)
        for live, place in self.picked:
            self.buffer.index_copy_(0, live, place)
        if not self.group.in_place:
            self.x_N.untyped_storage().resize_(0)
        if self.group.residual is not None and self.group.padding is not None:
            self.group.residual.values[self.group.padding] = 0


@dataclass(frozen=True)
class Bucket:
    """Everything about one bucket that does not change from step to step."""

    sources: tuple[Source, ...]
    """One for each group."""
    groups: tuple[Coded | Raw, ...]


@dataclass(frozen=True)
class Laid:
    """A bucket in a buffer of DDP's: tensors and messages. Operands read and write those tensors."""

    buffer: Tensor
    raw: tuple[RawTensors, ...]
    coded: tuple[CodedTensors, ...]
    messages: tuple[Message, ...]

    def gather(self, step: int) -> None:
        """Fill all tensors. Takes exempt elements out of a buffer that is encoded as it stands."""
        clear = any(tensors.group.in_place for tensors in self.coded)
        for raw in self.raw:
            raw.gather(clear)
        for coded in self.coded:
            coded.gather()
        for message in self.messages:
            message.set_step(step)

    def scatter(self) -> None:
        """Undo `gather` after the exchange. Coded groups first: one of them may be the buffer."""
        for coded in self.coded:
            coded.scatter()
        for raw in self.raw:
            raw.scatter()


def lay(
    bucket: Bucket,
    plans: Sequence[Plan],
    buffer: Tensor,
    coding: Coding,
    decay: float,
    transport: Transport,
    backend: str,
) -> Laid:
    """Tensors and messages of a bucket whose gradients stand in `buffer`."""
    tensors = [group.lay(buffer) for group in bucket.groups]
    operands = [group.operand(each.x_N, coding, decay) for group, each in zip(bucket.groups, tensors, strict=True)]
    messages = make_messages(plans, operands, transport, average=True, backend=backend) if operands else ()
    return Laid(
        buffer,
        tuple(each for each in tensors if isinstance(each, RawTensors)),
        tuple(each for each in tensors if isinstance(each, CodedTensors)),
        tuple(messages),
    )


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
        return Bucket((source,), (Coded(buffer.numel(), (), (), True),))
    sources: list[Source] = []
    groups: list[Coded | Raw] = []
    for pair in (*coded, *(pair for pair in formats if pair not in coded)):
        own = [m for m in members if m.numel and (m.format, m.answer) == pair]
        if pair in coded:
            source, group = _code(own, recipe, residual, len(coded) == 1, two_levels, world_size, buffer)
            groups.append(group)
        else:
            # Beside others, a chunk ends at a multiple of 16 bytes anyway; then nothing has to fill what would be left.
            source = Source(sum(m.numel for m in own), buffer.dtype, *pair, align=8 if len(formats) > 1 else 1)
            groups.append(Raw(tuple(_join(own))))
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
    leaks = feeds_back and (recipe.rotation is not None or fmt.kind in ("sign", "levels", "means"))
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
    lives = tuple(None if m.live is None else m.live + m.offset for m in members)
    group = Coded(numel, tuple(m.offset for m in members), tuple(segments), in_place, lives=lives)
    part = make_plan((source,), world_size=world_size).parts[0]
    if part.layout.format.kind == "raw":
        return source, group
    if feeds_back:
        padding = _find_padding(segments, numel, device) if leaks else None
        group = replace(group, residual=residual.bind(segments, numel, device), padding=padding)
    if recipe.rounding == "stochastic" or {"sign", "means"} & {part.layout.format.kind, part.answer.format.kind}:
        first_units = [m.first_unit for m in members]
        tables, answer_tables = (
            _number_blocks(segments, first_units, layout, unit, device) for layout in (part.layout, part.answer)
        )
        group = replace(group, blocks=tables, answer_blocks=answer_tables)
    return source, group


def _join(members: list[Member]) -> Iterator[tuple[int, int]]:
    """Runs (start, length) of the members' elements; neighbours make one run."""
    start = end = members[0].offset
    for m in members:
        if m.offset != end:
            yield start, end - start
            start = m.offset
        end = m.offset + m.numel
    yield start, end - start


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
