"""Plans: integers that say which bytes go where. No tensors, no processes.

A message is made of parts, each a flat tensor with its own formats: the compressed gradient of a bucket, its exempt
elements. Every rank owns one chunk of every part. A row of the first hop holds, for one owner, its chunk of each part,
one after the other; a row of the second hop holds the owner's answers in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from commq.codecs.formats import Format, get_format
from commq.codecs.wire import Layout

RAW = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Raw format of each dtype: what travels where encoding would not make a tensor smaller."""


@dataclass(frozen=True)
class Part:
    """One flat tensor in a message: its chunk in a row of either hop."""

    layout: Layout
    answer: Layout
    offset: int
    """First byte in a row of the first hop; `answer_offset` in the second. Multiples of 16."""
    answer_offset: int


@dataclass(frozen=True)
class Plan:
    """The two hops of one message among `world_size` ranks."""

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

    @property
    def sent_bytes(self) -> int:
        """Bytes each rank sends (and receives): all rows but its own, twice."""
        return (self.world_size - 1) * (self.row_bytes + self.answer_bytes)


def raw_bytes(numel: int, world_size: int) -> int:
    """Bytes each rank sends in a two-shot all-reduce of `numel` float32: 2 (W - 1) chunks of 4 ceil(N / W)."""
    return 2 * (world_size - 1) * 4 * -(-numel // world_size)


def make_plan(parts: list[tuple[int, Format, Format, int]], *, world_size: int, dtype: torch.dtype) -> Plan:
    """Plan a message of parts (numel, format, answer format, alignment) of tensors of `dtype`.

    A part whose two hops would take no fewer bytes than the plain elements goes raw, in the tensors' own dtype.
    """
    raw = get_format(RAW[dtype])
    planned: list[Part] = []
    row = answer_row = 0
    for numel, fmt, answer_fmt, align in parts:
        unit = max(fmt.unit, answer_fmt.unit, align)
        layout, answer = Layout(fmt, numel, world_size, unit), Layout(answer_fmt, numel, world_size, unit)
        plain = Layout(raw, numel, world_size)
        if layout.chunk_bytes + answer.chunk_bytes >= 2 * plain.chunk_bytes:
            layout = answer = plain
        planned.append(Part(layout, answer, row, answer_row))
        row = _ceil16(row + layout.chunk_bytes)
        answer_row = _ceil16(answer_row + answer.chunk_bytes)
    return Plan(world_size, tuple(planned))


def _row(chunks: list[tuple[int, Layout]]) -> int:
    """A lone chunk is as long as it is; rows of several are multiples of 16, so that every chunk is aligned."""
    offset, layout = chunks[-1]
    return offset + layout.chunk_bytes if len(chunks) == 1 else _ceil16(offset + layout.chunk_bytes)


def _ceil16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
