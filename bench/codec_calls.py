"""The calls that bench/codecs.py times: a family of one implementation on one format, length and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from commq.codecs.formats import Format, get_format
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout
from timing import Call

RANKS = 8
"""Chunks of a bucket, and messages that decode_sum_encode reduces."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One family on one kind of input."""

    family: str
    """encode, decode, decode_sum or decode_sum_encode."""
    format: str
    block: int | None = None
    numel: int
    """Elements of the bucket. decode_sum and decode_sum_encode get RANKS messages of numel / RANKS elements."""
    dtype: str = "bfloat16"
    """Of the bucket that is encoded or decoded to."""
    residual: str = ""
    """"" or the residual's storage: float32, bfloat16, int8."""
    rotation: int = 0
    stochastic: bool = False
    accumulate: bool = False

    def __str__(self) -> str:
        options = [f"residual {self.residual}"] if self.residual else []
        options += [f"rotation {self.rotation}"] if self.rotation else []
        options += ["stochastic"] if self.stochastic else []
        options += ["accumulate"] if self.accumulate else []
        block = f"/{self.block}" if self.block else ""
        return f"{self.family} {self.format}{block} {self.dtype} {' '.join(options)}".rstrip()

    @property
    def layout(self) -> Layout:
        fmt: Format = get_format(self.format, block=self.block)
        return Layout(fmt, self.numel, RANKS, align=self.rotation or 1)

    @property
    def coding(self) -> Coding:
        rotation = Rotation(size=self.rotation) if self.rotation else None
        return Coding(rounding="stochastic" if self.stochastic else "nearest", rotation=rotation, seed=1)

    @property
    def nbytes(self) -> int:
        """Bytes that must be read and written once."""
        layout = self.layout
        bucket = self.numel * getattr(torch, self.dtype).itemsize
        if self.family == "encode":
            residual = 2 * self.numel * getattr(torch, self.residual).itemsize if self.residual else 0
            scales = 8 * RANKS * layout.chunk_blocks if self.residual == "int8" else 0
            return bucket + layout.nbytes + residual + scales
        if self.family == "decode":
            return layout.nbytes + bucket * (2 if self.accumulate else 1)
        if self.family == "decode_sum":
            return layout.nbytes + 4 * layout.chunk_numel
        residual = 8 * layout.chunk_numel if self.residual else 0
        return layout.nbytes + layout.chunk_bytes + residual

    def build(self, codec: ModuleType, device: str) -> Call:
        """New buffers, and the call on them."""
        layout, coding = self.layout, self.coding
        wire = torch.empty(layout.chunks, layout.chunk_bytes, dtype=torch.uint8, device=device)
        if self.family == "encode":
            x, decay = _normal(self.numel, getattr(torch, self.dtype), device), 0.8 if self.residual else 0.0
            residual, scales = self._residual_of(layout, device)
            return lambda: codec.encode_bucket(
                x, wire, layout, coding, residual_N=residual, residual_scales_G=scales, decay=decay
            )
        _fill(wire, layout)
        if self.family == "decode":
            out = torch.zeros(self.numel, dtype=getattr(torch, self.dtype), device=device)
            return lambda: codec.decode_bucket(wire, layout, out, coding, accumulate=self.accumulate)
        if self.family == "decode_sum":
            return lambda: codec.decode_sum(wire, layout, divisor=float(RANKS))
        answer = torch.empty(layout.chunk_bytes, dtype=torch.uint8, device=device)
        residual_C = torch.zeros(layout.chunk_numel, device=device) if self.residual else None
        return lambda: codec.decode_sum_encode(
            wire, layout, answer, layout, coding, chunk=0, divisor=float(RANKS), residual_C=residual_C
        )

    def _residual_of(self, layout: Layout, device: str) -> tuple[Tensor | None, Tensor | None]:
        if not self.residual:
            return None, None
        residual = torch.zeros(self.numel, dtype=getattr(torch, self.residual), device=device)
        blocks = -(-self.numel // layout.format.block)
        return residual, torch.zeros(blocks, device=device) if self.residual == "int8" else None


def _normal(numel: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers, the same for every stretch of 2**24 elements."""
    x = torch.empty(numel, dtype=dtype, device=device)
    first = x[: 1 << 24].normal_()
    for start in range(1 << 24, numel, 1 << 24):
        x[start : start + (1 << 24)] = first[: numel - start]
    return x


def _fill(wire: Tensor, layout: Layout) -> None:
    """Bytes that decode to ordinary numbers, without an encoder."""
    wire.random_(0, 256)
    if layout.format.kind == "raw":
        wire.zero_()
        return
    patterns = {"fp32": (0, 0, 0x80, 0x3F), "bf16": (0x80, 0x3F), "e8m0": (127,), "e4m3": (0x38,)}
    pattern = torch.tensor(patterns[layout.format.scale], dtype=torch.uint8, device=wire.device)
    scales = layout.scales(wire)
    scales.copy_(pattern.repeat(scales.shape[1] // len(pattern)))
    if layout.format.group:
        one = torch.tensor((0, 0, 0x80, 0x3F), dtype=torch.uint8, device=wire.device)
        groups = layout.groups(wire)
        groups.copy_(one.repeat(groups.shape[1] // 4))


def copies(nbytes: int, device: str) -> dict[str, tuple[Callable[[], Call], bool]]:
    """Ways to read nbytes / 2 and write as many: what builds each, and whether it is captured in a graph.

    A driver may take its copy engines in one of them and a kernel in another; the fastest is what counts.
    """

    def build(kernel: bool) -> Call:
        source = torch.zeros(max(nbytes // 4, 1), dtype=torch.bfloat16, device=device)
        target = torch.zeros_like(source)
        return (lambda: torch.neg(source, out=target)) if kernel else (lambda: target.copy_(source))

    plain = {"copy_": (partial(build, False), False)}
    if device == "cpu":
        return plain
    return {**plain, "copy_ in a graph": (partial(build, False), True), "neg": (partial(build, True), True)}


def one_way(nbytes: int, device: str) -> dict[str, tuple[Callable[[], Call], int]]:
    """What memory does when a call only reads, or only writes, `nbytes`: what builds it, and the bytes it moves.

    An encoder of signs reads 16 times what it writes, and a decoder the other way round.
    """

    def read() -> Call:
        rows = torch.zeros(nbytes // 4096, 1024, dtype=torch.float32, device=device)
        sums = torch.empty(len(rows), device=device)
        return lambda: torch.sum(rows, 1, out=sums)

    def write() -> Call:
        return torch.empty(nbytes, dtype=torch.uint8, device=device).zero_

    return {"read: sums of 1024 float32": (read, nbytes + nbytes // 1024), "write: zero_": (write, nbytes)}


def chain(codec: ModuleType, device: str, nbytes: int = 1 << 20) -> Callable[[], Call]:
    """The three kernels of an all-reduce, int4, on a bfloat16 bucket of `nbytes`."""
    work = Work(family="encode", format="int4", numel=nbytes // 2)
    layout, coding = work.layout, work.coding

    def build() -> Call:
        x = _normal(work.numel, torch.bfloat16, device)
        wire = torch.empty(layout.chunks, layout.chunk_bytes, dtype=torch.uint8, device=device)
        answer = torch.empty(layout.chunk_bytes, dtype=torch.uint8, device=device)

        def call() -> None:
            codec.encode_bucket(x, wire, layout, coding)
            codec.decode_sum_encode(wire, layout, answer, layout, coding, chunk=0, divisor=float(RANKS))
            codec.decode_bucket(wire, layout, x, coding)

        return call

    return build
