"""Messages: the tensors that an exchange works on, beside the integers of their plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from commq.codecs.ops import implementation
from commq.codecs.reference import Blocks, Coding
from commq.codecs.wire import Layout
from commq.collectives.plan import Part, Plan
from commq.collectives.transport import Transport

ANSWER_STREAM = 1
"""Philox stream of the second hop: each element has one owner, and its bits must not depend on which rank that is."""


def send_stream(rank: int) -> int:
    """Philox stream of a rank's first hop: errors of different ranks must not be the same."""
    return rank << 1


def host_stream(host: int) -> int:
    """Philox stream of the sum of a host's ranks: other hosts encode the same elements. Odd, and not ANSWER_STREAM."""
    return (host << 1) + 3


@lru_cache(maxsize=1024)
def with_stream(coding: Coding, stream: int) -> Coding:
    """The coding with its random bits from `stream`. Remembered: hooks ask for the same ones in every step."""
    return replace(coding, stream=stream)


@lru_cache(maxsize=1024)
def with_step(coding: Coding, step: int) -> Coding:
    """The coding of optimizer step `step`. Remembered: all buckets ask for the same one."""
    return replace(coding, step=step)


@dataclass(frozen=True)
class Operand:
    """One source as tensors."""

    x_N: Tensor
    """What is sent: float32, bfloat16 or float16, contiguous, 1-D."""
    out_N: Tensor
    """Where the result goes; may be x_N itself."""
    coding: Coding
    blocks: Blocks | None = None
    """Numbering of the first hop's blocks; None: 0, 1, 2, ..."""
    answer_blocks: Blocks | None = None
    residual_N: Tensor | None = None
    """Feedback of the first hop, with one scale a block if it is int8."""
    residual_scales_G: Tensor | None = None
    decay: float = 0.0
    answer_residual: Tensor | None = None
    """Feedback of the second hop (classic): float32, `answer_residual_numel` elements, the own chunk of each piece."""
    inside_blocks: Blocks | None = None
    """Numbering of the blocks inside a host, where those are of another length than `blocks`."""


@dataclass(eq=False)
class PartOperand:
    """The run of an operand that a part covers."""

    part: Part
    x: Tensor
    out: Tensor
    coding: Coding
    """Exchanged again with other random bits: see `Message.set_step`."""
    blocks: Blocks | None
    answer_blocks: Blocks | None
    residual: Tensor | None
    residual_scales: Tensor | None
    decay: float
    answer_residual_C: Tensor | None
    inside_blocks: Blocks | None

    def sent(self, rows_KS: Tensor) -> Tensor:
        """The part's bytes in rows of the first hop."""
        return rows_KS[:, self.part.offset : self.part.offset + self.part.layout.chunk_bytes]

    def sent_inside(self, rows_KS: Tensor) -> Tensor:
        """The part's bytes in rows inside a host."""
        return rows_KS[:, self.part.inside_offset : self.part.inside_offset + self.part.inside.chunk_bytes]

    def answered(self, rows_KS: Tensor) -> Tensor:
        """The part's bytes in rows of the second hop."""
        return rows_KS[:, self.part.answer_offset : self.part.answer_offset + self.part.answer.chunk_bytes]


def make_messages(
    plans: Sequence[Plan],
    operands: Sequence[Operand],
    transport: Transport,
    *,
    average: bool,
    backend: str = "auto",
) -> Iterator[Message]:
    """The pieces of a message, in order."""
    formats = dict.fromkeys(fmt for plan in plans for fmt in plan.formats)
    codec = implementation(backend, operands[0].x_N.device, *formats)
    divisor = float(transport.world_size) if average else 1.0
    starts = [0] * len(operands)
    for plan in plans:
        yield Message(plan, operands, transport, codec, divisor, tuple(starts))
        for part in plan.parts:
            starts[part.source] += part.answer.chunk_numel


@dataclass(frozen=True)
class Message:
    """One piece: its plan, its operands, and what moves and encodes it."""

    plan: Plan
    operands: Sequence[Operand]
    transport: Transport
    codec: ModuleType
    divisor: float
    """What sums are divided by: the world size for an average, else 1."""
    answer_residual_start: tuple[int, ...] = ()
    """Where this piece's chunk begins in each operand's answer_residual."""

    @property
    def device(self) -> torch.device:
        return self.operands[0].x_N.device

    @cached_property
    def parts(self) -> list[PartOperand]:
        return [self._part_operand(part) for part in self.plan.parts]

    def set_step(self, step: int) -> None:
        """The same tensors are exchanged in optimizer step `step`: the counter of random bits follows."""
        for part in self.parts:
            if part.coding.step != step:
                part.coding = with_step(part.coding, step)

    def take(self, rows: int, nbytes: int) -> Tensor:
        """A buffer of (rows, nbytes); zeros where parts leave gaps, so that what is sent is never stale memory."""
        buffer = self.transport.memory.take(rows, nbytes, self.device)
        return buffer.zero_() if self.plan.has_gaps else buffer

    def take_received(self, rows: int, nbytes: int) -> Tensor:
        """The same for what a move fills from end to end."""
        return self.transport.memory.take(rows, nbytes, self.device)

    def sent(self, rows_KS: Tensor) -> Sequence[Tensor]:
        """Rows of the first hop by parts: views, of which one call makes all."""
        splits = self.plan.splits
        return (rows_KS,) if len(splits) == 1 else rows_KS.split_with_sizes(splits, -1)

    def answered(self, rows: Tensor) -> Sequence[Tensor]:
        """The same of rows of the second hop, or of one row (S,)."""
        splits = self.plan.answer_splits
        return (rows,) if len(splits) == 1 else rows.split_with_sizes(splits, -1)

    def give(self, *buffers: Tensor) -> None:
        self.transport.memory.give(*buffers)

    def _part_operand(self, part: Part) -> PartOperand:
        operand, here = self.operands[part.source], slice(part.start, part.start + part.numel)
        x, out = operand.x_N[here], operand.out_N[here]
        if part.layout.format.kind == "raw":
            # Nothing to rotate, and nothing is lost that is worth feeding back.
            coding = replace(operand.coding, rotation=None)
            return PartOperand(part, x, out, coding, None, None, None, None, 0.0, None, None)
        scales = operand.residual_scales_G
        if scales is not None:
            scales = scales[_blocks_of(part, part.layout)]
        answer_residual = operand.answer_residual
        if answer_residual is not None:
            start = self.answer_residual_start[part.source]
            answer_residual = answer_residual[start : start + part.answer.chunk_numel]
        blocks = self._blocks(operand, operand.blocks, part, part.layout)
        return PartOperand(
            part,
            x,
            out,
            operand.coding,
            blocks,
            self._blocks(operand, operand.answer_blocks, part, part.answer),
            None if operand.residual_N is None else operand.residual_N[here],
            scales,
            operand.decay,
            answer_residual,
            self._inside_blocks(operand, blocks, part),
        )

    def _inside_blocks(self, operand: Operand, blocks: Blocks | None, part: Part) -> Blocks | None:
        if part.inside.format.kind == "raw":
            return None
        if part.inside.format.block == part.layout.format.block:
            return blocks
        if operand.blocks is not None and operand.inside_blocks is None:
            raise ValueError(
                f"blocks of {part.layout.format} are numbered, expected those of {part.inside.format}, too"
            )
        return self._blocks(operand, operand.inside_blocks, part, part.inside)

    def _blocks(self, operand: Operand, blocks: Blocks | None, part: Part, layout: Layout) -> Blocks | None:
        """The numbering of a run's blocks. The counter of random bits does not start anew with each piece."""
        if part.numel == operand.x_N.numel():
            return blocks
        count, first = layout.chunks * layout.chunk_blocks, part.start // layout.format.block
        if blocks is not None:
            return Blocks(blocks.ids_G[first : first + count], blocks.valid_G[first : first + count])
        if operand.coding.rounding == "nearest":
            return None
        ids = torch.arange(count, device=self.device)
        valid = (layout.numel - ids * layout.format.block).clamp(0, layout.format.block).to(torch.int32)
        return Blocks(ids + first, valid)


def _blocks_of(part: Part, layout: Layout) -> slice:
    first = part.start // layout.format.block
    return slice(first, first + -(-part.numel // layout.format.block))
