"""Plans: integers that say which bytes go where. No tensors, no processes.

What is exchanged is one or several flat tensors (`Source`), each with its own formats: the compressed gradient of a
bucket, its exempt elements, the tensors of a list. A long message is cut into pieces, so that one is encoded while
another travels. A piece is made of parts: each a run of one source. Every rank owns one chunk of every part. A row of
the first hop holds, for one owner, its chunk of each part, one after the other; a row of the second hop holds the
owner's answers in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from commq.codecs.formats import Format, get_format
from commq.codecs.wire import Layout

RAW = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Raw format of each dtype: what travels where encoding would not make a tensor smaller."""


@dataclass(frozen=True)
class Source:
    """A flat tensor of a message: its length and dtype, and the formats that it travels in."""

    numel: int
    dtype: torch.dtype
    format: Format
    answer: Format
    align: int = 1
    """A power of two that chunks are a multiple of besides the formats' units: the length of a rotation."""
    inside: Format | None = None
    """Format between ranks of one host, for schedules that treat them apart; None: as `format`."""
    whole: bool = False
    """It may not be cut: random bits of raw formats are counted from the start of a part."""

    @property
    def unit(self) -> int:
        inside = self.inside or self.format
        return max(self.format.unit, self.answer.unit, inside.unit, self.align)

    def layouts(self, numel: int, chunks: int) -> tuple[Layout, Layout, Layout]:
        """Layouts of both hops, and of the one inside a host, for a run of `numel` elements."""
        if self.is_raw(chunks):
            align = self.align if self.format.kind == "raw" else 1
            plain = Layout(get_format(RAW[self.dtype]), numel, chunks, align)
            return plain, plain, plain
        layout, answer, inside = (
            Layout(fmt, numel, chunks, self.unit) for fmt in (self.format, self.answer, self.inside or self.format)
        )
        return layout, answer, inside

    def is_raw(self, chunks: int) -> bool:
        """The two hops would take no fewer bytes than the plain elements, which therefore travel as they are.

        Decided for the whole source, so that cutting it changes no bit. Inside a host, `inside` is the first hop.
        """
        layout, answer, inside = (
            Layout(fmt, self.numel, chunks, self.unit).chunk_bytes
            for fmt in (self.format, self.answer, self.inside or self.format)
        )
        return max(layout, inside) + answer >= 2 * Layout(get_format(RAW[self.dtype]), self.numel, chunks).chunk_bytes


@dataclass(frozen=True)
class Part:
    """A run of one source in a piece: its chunk in a row of either hop."""

    source: int
    """Number of the source."""
    start: int
    """First element of the run; it has layout.numel elements."""
    layout: Layout
    answer: Layout
    inside: Layout
    itemsize: int
    """Bytes of an element as it stands in its tensor."""
    offset: int
    """First byte in a row of the first hop; `answer_offset` in the second. Multiples of 16."""
    answer_offset: int
    inside_offset: int
    """First byte in a row of the hop inside a host, for schedules that have one."""

    @property
    def numel(self) -> int:
        return self.layout.numel


@dataclass(frozen=True)
class Plan:
    """The two hops of one piece among `world_size` ranks."""

    world_size: int
    parts: tuple[Part, ...]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row of the first hop: one chunk of every part."""
        return _row([(part.offset, part.layout) for part in self.parts])

    @cached_property
    def answer_bytes(self) -> int:
        """Bytes of a row of the second hop: one answer to every part."""
        return _row([(part.answer_offset, part.answer) for part in self.parts])

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """`row_bytes` by parts, each with the gap after it."""
        return _splits([part.offset for part in self.parts], self.row_bytes)

    @cached_property
    def answer_splits(self) -> tuple[int, ...]:
        """The same of `answer_bytes`."""
        return _splits([part.answer_offset for part in self.parts], self.answer_bytes)

    @cached_property
    def inside_bytes(self) -> int:
        """Bytes of a row inside a host: one chunk of every part."""
        return _row([(part.inside_offset, part.inside) for part in self.parts])

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """All formats of its hops, each once: what codecs must have."""
        layouts = (layout for part in self.parts for layout in (part.layout, part.answer, part.inside))
        return tuple(dict.fromkeys(layout.format for layout in layouts))

    @cached_property
    def has_gaps(self) -> bool:
        """Rows have bytes between parts that no codec writes."""
        layouts = (layout for part in self.parts for layout in (part.layout, part.answer, part.inside))
        return len(self.parts) > 1 and any(layout.chunk_bytes % 16 for layout in layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of the piece's elements as they stand in their tensors."""
        return sum(part.numel * part.itemsize for part in self.parts)

    @property
    def sent_bytes(self) -> int:
        """Bytes each rank sends (and receives) in two shots: all rows but its own, twice."""
        return (self.world_size - 1) * (self.row_bytes + self.answer_bytes)


def raw_bytes(numel: int, world_size: int) -> int:
    """Bytes each rank sends in an uncompressed all-reduce of `numel` float32."""
    return ring_bytes(numel, 4, world_size)


def ring_bytes(numel: int, itemsize: int, world_size: int) -> int:
    """Bytes each rank sends in an all-reduce as a ring, or in two shots: 2 (W - 1) chunks of ceil(N / W) elements."""
    return 2 * (world_size - 1) * itemsize * -(-numel // world_size)


def make_plan(sources: tuple[Source, ...], *, world_size: int) -> Plan:
    """Plan a message that travels in one piece."""
    return _plan_piece(sources, [(i, 0, source.numel) for i, source in enumerate(sources)], world_size)


@lru_cache(maxsize=1024)
def make_plans(sources: tuple[Source, ...], *, world_size: int, piece_bytes: int) -> tuple[Plan, ...]:
    """Plan a message that travels in pieces of about `piece_bytes` of its tensors' own elements.

    Cuts lie where blocks and chunks end, so a piece has no padding but the last of each source.
    """
    plans: list[Plan] = []
    runs: list[tuple[int, int, int]] = []
    room = piece_bytes
    for i, source in enumerate(sources):
        itemsize, step = source.dtype.itemsize, source.unit * world_size
        start = 0
        while start < source.numel:
            numel = left = source.numel - start
            # The rest joins this piece if it nearly fits: a short piece costs a message of its own.
            if not source.whole and 4 * left * itemsize > 5 * room:
                steps = max(room // itemsize // step, 0 if runs else 1)
                numel = min(steps * step, left)
            if numel:
                runs.append((i, start, numel))
                room -= numel * itemsize
                start += numel
            if start < source.numel:
                plans.append(_plan_piece(sources, runs, world_size))
                runs, room = [], piece_bytes
    if runs or not plans:
        plans.append(_plan_piece(sources, runs, world_size))
    return tuple(plans)


def _plan_piece(sources: tuple[Source, ...], runs: list[tuple[int, int, int]], world_size: int) -> Plan:
    parts: list[Part] = []
    row = answer_row = inside_row = 0
    for i, start, numel in runs:
        layout, answer, inside = sources[i].layouts(numel, world_size)
        parts.append(Part(i, start, layout, answer, inside, sources[i].dtype.itemsize, row, answer_row, inside_row))
        row = ceil16(row + layout.chunk_bytes)
        answer_row = ceil16(answer_row + answer.chunk_bytes)
        inside_row = ceil16(inside_row + inside.chunk_bytes)
    return Plan(world_size, tuple(parts))


def _row(chunks: list[tuple[int, Layout]]) -> int:
    """A lone chunk is as long as it is; rows of several are multiples of 16, so that every chunk is aligned."""
    if not chunks:
        return 0
    offset, layout = chunks[-1]
    return offset + layout.chunk_bytes if len(chunks) == 1 else ceil16(offset + layout.chunk_bytes)


def _splits(offsets: list[int], nbytes: int) -> tuple[int, ...]:
    return tuple(end - start for start, end in pairwise([*offsets, nbytes]))


def ceil16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
