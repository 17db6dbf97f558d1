"""Rows: what each rank gets from a tensor, or gives to it. What rows are made of, and how they become bytes.

Rows may have different lengths. Each is encoded on its own, so that it can be decoded where it arrives. Long rows
travel in pieces: a piece holds the same columns of every row, one row after the other without gaps. Where rows are
cut changes no bit of what is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from commq.codecs.formats import MAX_BLOCK, Format, get_format
from commq.codecs.ops import implementation
from commq.codecs.reference import Blocks, Coding, count_blocks
from commq.codecs.rotation import unrotate
from commq.codecs.wire import Layout
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.memory import Memory
from commq.collectives.plan import RAW

CUT = MAX_BLOCK
"""Rows are cut at multiples of this many elements, which is a multiple of every unit."""
CUT_BYTES = 32
"""What a cut costs at most: sections of a row (scales, group scales) end at multiples of 16 bytes."""


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor as integers: how long they are and how they travel."""

    lengths: tuple[int, ...]
    """Elements of each row."""
    dtype: torch.dtype
    """Of what is sent."""
    format: Format
    align: int = 1
    """A power of two that runs are a multiple of besides the format's unit: the length of a rotation."""
    whole: bool = False
    """They may not be cut, and are encoded together: random bits of raw formats are counted from the first element."""
    kept: int | None = None
    """The row that stays where it is: it takes no bytes."""

    @property
    def unit(self) -> int:
        return max(self.format.unit, self.align)

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Of each row: raw, in the tensor's own dtype, where encoding would not make the row smaller, however cut."""
        plain = get_format(RAW[self.dtype])
        return tuple(self.format if self._shrinks(numel) else plain for numel in self.lengths)

    def _shrinks(self, numel: int) -> bool:
        return self.layout(self.format, numel).nbytes + numel // CUT * CUT_BYTES < numel * self.dtype.itemsize

    def layout(self, fmt: Format, numel: int) -> Layout:
        """Of a run of one row."""
        return Layout(fmt, numel, 1, 1 if fmt.kind == "raw" else self.align)


@dataclass(frozen=True)
class Run:
    """The columns of one row that a piece holds."""

    row: int
    start: int
    """First element, counted in the row."""
    layout: Layout
    offset: int
    """First byte in the piece."""
    first_block: int
    """Number of the first block among those of all rows: no two blocks of a tensor share random bits."""

    @property
    def numel(self) -> int:
        return self.layout.numel


@dataclass(frozen=True)
class Piece:
    """The same columns of every row, as one message."""

    runs: tuple[Run, ...]
    together: Layout | None
    """Layout of all rows at once, if it says the same bytes: one call encodes or decodes them all."""

    @property
    def splits(self) -> list[int]:
        """Bytes of each row."""
        return [run.layout.nbytes for run in self.runs]

    @property
    def even(self) -> bool:
        """All rows take the same number of bytes."""
        return len(set(self.splits)) == 1

    @cached_property
    def nbytes(self) -> int:
        return sum(self.splits)


@lru_cache(maxsize=1024)
def cut(rows: Rows, piece_bytes: int | None) -> tuple[Piece, ...]:
    """The pieces of rows: about `piece_bytes` of elements each, counted over all rows; None: exactly one piece.

    They depend on the lengths alone, so ranks that know the same lengths cut in the same way.
    """
    longest, ends = max(rows.lengths, default=0), [0]
    while piece_bytes is not None and not rows.whole:
        left = [length - ends[-1] for length in rows.lengths if length > ends[-1]]
        # The rest joins this piece if it nearly fits: a short piece costs a message of its own.
        if 4 * sum(left) * rows.dtype.itemsize <= 5 * piece_bytes:
            break
        steps = piece_bytes // rows.dtype.itemsize // len(left) // CUT
        ends.append(min(ends[-1] + max(steps, 1) * CUT, longest))
    if ends[-1] < longest or piece_bytes is None:
        ends.append(longest)
    together = _together(rows) if len(ends) == 2 else None
    return tuple(Piece(_runs(rows, first, end), together) for first, end in pairwise(ends))


def _runs(rows: Rows, first: int, end: int) -> tuple[Run, ...]:
    runs: list[Run] = []
    offset = block = 0
    for row, (length, fmt) in enumerate(zip(rows.lengths, rows.formats, strict=True)):
        start = min(first, length)
        layout = rows.layout(fmt, 0 if row == rows.kept else min(end, length) - start)
        runs.append(Run(row, start, layout, offset, block + start // rows.format.block))
        offset += layout.nbytes
        block += -(-length // rows.unit) * rows.unit // rows.format.block
    return tuple(runs)


def _together(rows: Rows) -> Layout | None:
    formats = {fmt for fmt, length in zip(rows.formats, rows.lengths, strict=True) if length}
    if len(formats) != 1 or rows.kept is not None:
        return None
    (fmt,), numel = formats, sum(rows.lengths)
    if fmt.kind == "raw":
        return Layout(fmt, numel)
    if len(set(rows.lengths)) == 1 and rows.lengths[0] % rows.unit == 0:
        return Layout(fmt, numel, len(rows.lengths), rows.align)
    return None


@dataclass(frozen=True)
class RowTensors:
    """Rows as tensors."""

    rows: Sequence[Tensor]
    """Each 1-D and contiguous."""
    flat: Tensor | None = None
    """The vector whose consecutive runs they are, if they are of one."""

    @staticmethod
    def split(flat_N: Tensor, lengths: Sequence[int]) -> RowTensors:
        ends = list(accumulate(lengths, initial=0))
        return RowTensors([flat_N[first:end] for first, end in pairwise(ends)], flat_N)


class RowCodec:
    """Encodes and decodes pieces of rows, and holds what all rows of an exchange have in common."""

    def __init__(self, fmt: Format, coding: Coding, device: torch.device, memory: Memory, backend: str) -> None:
        """coding.stream: the sender's `send_stream` (decoding does not use it)."""
        self.format, self.coding, self.device = fmt, coding, device
        self._codec, self._memory = implementation(backend, device, fmt), memory

    @property
    def whole(self) -> bool:
        """Rows.whole, of any rows."""
        return self.coding.rounding == "stochastic" and self.format.kind == "raw"

    def pieces(
        self, lengths: Sequence[int], dtype: torch.dtype, *, kept: int | None = None, single: bool = False
    ) -> tuple[Piece, ...]:
        """Rows of these lengths, cut if they are long. kept: the row that stays; single: exactly one piece."""
        align = self.coding.rotation.size if self.coding.rotation else 1
        rows = Rows(tuple(lengths), dtype, self.format, align, self.whole, kept)
        return cut(rows, None if single else PIECE_BYTES[self.device.type])

    def take(self, rows: int, nbytes: int) -> Tensor:
        """uint8 (rows, nbytes) with arbitrary contents; `give` it back."""
        return self._memory.take(rows, nbytes, self.device)

    def give(self, *buffers: Tensor) -> None:
        self._memory.give(*buffers)

    def encode(self, piece: Piece, x: RowTensors, wire_S: Tensor, residual: RowTensors | None = None) -> None:
        """Write all bytes of a piece: uint8 (piece.nbytes,). residual: classic feedback, of the same lengths as x."""
        if piece.together is not None and x.flat is not None:
            self._encode(x.flat, wire_S, piece.together, 0, residual.flat if residual else None)
            return
        for run, x_C in zip(piece.runs, x.rows, strict=True):
            lost_C = residual.rows[run.row] if residual else None
            self.encode_run(run, x_C, wire_S[run.offset : run.offset + run.layout.nbytes], lost_C)

    def encode_run(self, run: Run, x_C: Tensor, wire_S: Tensor, residual_C: Tensor | None = None) -> None:
        """Write the bytes of a run of the row x_C: uint8 (run.layout.nbytes,)."""
        if run.numel:
            here = slice(run.start, run.start + run.numel)
            lost = None if residual_C is None else residual_C[here]
            self._encode(x_C[here], wire_S, run.layout, run.first_block, lost)

    def decode(self, piece: Piece, wire_S: Tensor, out: RowTensors) -> None:
        """Read all bytes of a piece, uint8 (piece.nbytes,), and write its columns of all rows."""
        if piece.together is not None and out.flat is not None:
            self._decode(wire_S, piece.together, out.flat)
            return
        for run, out_C in zip(piece.runs, out.rows, strict=True):
            if run.numel:
                row_S = wire_S[run.offset : run.offset + run.layout.nbytes]
                self._decode(row_S, run.layout, out_C[run.start : run.start + run.numel])

    def decode_sum(self, run: Run, wire_WS: Tensor, out_C: Tensor, *, divisor: float) -> None:
        """Sum W versions of a run in float32, in order, divide, and write it into the row out_C."""
        if not run.numel:
            return
        total = self._codec.decode_sum(wire_WS, run.layout, divisor=divisor)
        rotation = self._coding_of(run.layout).rotation
        if rotation is not None:
            signs = rotation.sign_pattern(seed=self.coding.seed, step=self.coding.step, device=self.device)
            total = unrotate(total, rotation, signs)
        out_C[run.start : run.start + run.numel].copy_(total[: run.numel])

    def _encode(self, x: Tensor, wire_S: Tensor, layout: Layout, first_block: int, residual: Tensor | None) -> None:
        coding, blocks = self._coding_of(layout), None
        if layout.format.kind == "raw":
            residual = None
            if layout.format.name == RAW[x.dtype]:
                coding = replace(coding, rounding="nearest")  # nothing is rounded
        elif first_block and coding.rounding == "stochastic":
            counted = count_blocks(layout, self.device)
            blocks = Blocks(counted.ids_G + first_block, counted.valid_G)
        wire_WS = wire_S.view(layout.chunks, layout.chunk_bytes)
        self._codec.encode_bucket(x, wire_WS, layout, coding, residual_N=residual, blocks=blocks)

    def _decode(self, wire_S: Tensor, layout: Layout, out: Tensor) -> None:
        wire_WS = wire_S.view(layout.chunks, layout.chunk_bytes)
        self._codec.decode_bucket(wire_WS, layout, out, self._coding_of(layout))

    def _coding_of(self, layout: Layout) -> Coding:
        """Nothing is rotated that has no scale."""
        return replace(self.coding, rotation=None) if layout.format.kind == "raw" else self.coding
