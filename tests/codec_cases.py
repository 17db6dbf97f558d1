"""Seeded random cases for the codec families: what to encode, how, and into which buffers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from commq.codecs import reference
from commq.codecs.formats import FORMATS, LEVEL_FORMATS, SCALES, SPIKE_FORMATS, Format, get_format, level_format
from commq.codecs.reference import Blocks, Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout

FORMAT_SCALES = [(name, scale) for name in FORMATS for scale in SCALES.get(name, (None,))]
TABLES: dict[str, Format] = {
    **{name: fmt for name, fmt in LEVEL_FORMATS.items() if fmt.bits <= 4},
    "two": level_format("two", 1, (-1.0, 1.0)),
    "three": level_format("three", 2, (-1.0, 0.125, 1.0)),
    "seven": level_format("seven", 3, (-1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0)),
    "sixteen": level_format("sixteen", 4, (-1.0, *(k / 14 for k in range(15)))),
}
"""Formats of levels that every implementation has: those with names, and odd ones."""
SWEEP = [*FORMAT_SCALES, *((name, ("fp32", "bf16")[k % 2]) for k, name in enumerate(TABLES))]
"""What the cases go through by turns: a format's name and its scale."""
SPIKES = [(name, SCALES[name][k % 2]) for k, name in enumerate(SPIKE_FORMATS)]
"""A sweep of its own: the native library does not have them."""
_LENGTHS = (0, 1, 2, 15, 16, 17, 127, 128, 129, 1000, 4095, 4097)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


LEVELS = [
    replace(get_format(name) if name in LEVEL_FORMATS else TABLES[name], block=block, scale=scale)
    for name, block, scale in (
        ("eden1", 64, "bf16"),
        ("eden2", 128, "fp32"),
        ("lloyd3", 16, "fp32"),
        ("eden4", 256, "bf16"),
        ("three", 128, "bf16"),
        ("seven", 16, "fp32"),
        ("dynamic8", 128, "bf16"),
        ("dynamic8", 256, "fp32"),
    )
] + [get_format("means", block=block) for block in (16, 256)]
"""Some formats of levels, of all kinds, with small and large blocks, and those with two means."""


def nasty(length: int, generator: torch.Generator) -> Tensor:
    """float32 (length,): normal numbers of one magnitude, with stretches of everything that codecs get wrong."""
    x = torch.randn(length, generator=generator)
    smallest, largest = 2.0**-149, torch.finfo(torch.float32).max
    stretches = (
        lambda n: torch.zeros(n),
        lambda n: torch.ones(n),
        lambda n: torch.full((n,), -0.1),
        lambda n: torch.randint(-14, 15, (n,), generator=generator) / 2,  # ties
        lambda n: torch.randn(n, generator=generator) * torch.logspace(-45, 38, n),
        lambda n: torch.randint(-9, 10, (n,), generator=generator) * smallest,
        lambda n: torch.where(torch.rand(n, generator=generator) < 0.5, largest, -largest),
        lambda n: torch.zeros(n).index_fill(0, torch.tensor([n // 2]), smallest),
        lambda n: torch.randn(n, generator=generator).index_fill(0, torch.tensor([n // 2]), largest),
        lambda n: torch.randn(n, generator=generator).index_fill(0, torch.tensor([n // 3]), torch.inf),
        lambda n: torch.randn(n, generator=generator).index_fill(0, torch.tensor([n // 3]), -torch.inf),
        lambda n: torch.randn(n, generator=generator).index_fill(0, torch.tensor([n // 3]), torch.nan),
    )
    for _ in range(0 if length == 0 else 6):
        start, kind = torch.randint(2**31, (2,), generator=generator).tolist()
        piece = x[start % length :][: 1 + start % 500]
        piece.copy_(stretches[kind % len(stretches)](len(piece)))
    return x


@dataclass
class Case:
    """One random case; `number` fixes everything, and the format by turns."""

    number: int
    sweep: list = field(default_factory=lambda: SWEEP)
    layout: Layout = field(init=False)
    answer_layout: Layout = field(init=False)
    coding: Coding = field(init=False)
    arguments: dict = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        choose = self._choose = random.Random(self.number)
        self._generator = torch.Generator().manual_seed(self.number)
        fmt = self._format(*self.sweep[self.number % len(self.sweep)])
        other = self._format(*choose.choice([*SWEEP, *self.sweep] if self.sweep is SPIKES else SWEEP))
        answer = fmt if choose.random() < 0.4 else other  # the usual call has a kernel of its own
        rounding = "nearest"
        if fmt.unbiased and answer.unbiased and choose.random() < 0.5:
            rounding = "stochastic"
        rotation = None
        if fmt.kind != "raw" and choose.random() < 0.4:
            rotation = Rotation(size=choose.choice((16, 32, 64, 128, 256, 512, 1024)), signs=choose.random() < 0.5)
        self.coding = Coding(
            rounding=rounding,
            rotation=rotation,
            seed=choose.getrandbits(32),
            step=choose.getrandbits(choose.choice((3, 40))),
            stream=choose.getrandbits(32),
        )
        numel = choose.choice((*_LENGTHS, choose.randrange(20000)))
        chunks = choose.choice((1, 1, 2, 3, 8, 17))
        self.layout = Layout(fmt, numel, chunks, align=max(answer.unit, rotation.size if rotation else 1))
        self.answer_layout = Layout(answer, numel, chunks, align=self.layout.unit)
        self.dtype, self.out_dtype = choose.choice(_DTYPES), choose.choice(_DTYPES)
        self.divisor = choose.choice((1.0, 3.0, 8.0))
        self.chunk = choose.randrange(chunks)
        self.stride = choose.choice((0, 0, 16, 13))  # bytes between rows
        self.accumulate, self.blocks, self.second_hop = (choose.random() < 0.5 for _ in range(3))
        self.residual = None if fmt.kind == "raw" else choose.choice((None, torch.float32, torch.bfloat16, torch.int8))
        self.prescale = choose.choice((1.0, 0.125, 0.3))
        self.decay = choose.choice((0.0, 0.8)) if self.residual else 0.0

    def _format(self, name: str, scale: str | None) -> Format:
        if name in TABLES:
            return replace(TABLES[name], block=2 ** self._choose.randint(4, 12), scale=scale)
        if name not in SCALES:
            return get_format(name)
        return get_format(name, block=2 ** self._choose.randint(4, 8 if name in SPIKE_FORMATS else 12), scale=scale)

    def __str__(self) -> str:
        c, r = self.coding, self.coding.rotation
        return (
            f"case {self.number}: {self.layout} {self.dtype} {c.rounding} rotation={r and (r.size, r.signs)} "
            f"residual={self.residual} decay={self.decay} prescale={self.prescale} stride+{self.stride} "
            f"blocks={self.blocks}; out {self.out_dtype} accumulate={self.accumulate}; sum / {self.divisor}; answer "
            f"{self.answer_layout.format} chunk {self.chunk} residual={self.second_hop}"
        )

    def vector(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return nasty(length, self._generator).to(dtype)

    def finite(self, length: int) -> Tensor:
        return torch.randn(length, generator=self._generator) * self._choose.choice((1e-30, 0.1, 1e30))

    def wire_bytes(self, layout: Layout, rows: int) -> Tensor:
        return torch.randint(256, (rows, layout.chunk_bytes), generator=self._generator, dtype=torch.uint8)

    def residual_tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """The residual and its scales, with old content."""
        if self.residual is None:
            return None, None
        numel, block = self.layout.numel, self.layout.format.block
        if self.residual != torch.int8:
            return self.finite(numel).to(self.residual), None
        codes = torch.randint(-127, 128, (numel,), generator=self._generator, dtype=torch.int8)
        return codes, self.finite(-(-numel // block)).abs()

    def block_table(self, layout: Layout) -> Blocks | None:
        if not self.blocks:
            return None
        count = layout.chunks * layout.chunk_blocks
        ids_G = torch.randint(2**40, (count,), generator=self._generator)
        valid_G = torch.randint(layout.format.block + 1, (count,), generator=self._generator, dtype=torch.int32)
        return Blocks(ids_G, valid_G)


GAP = 77
"""What stands between the rows of a wire buffer; nothing may write there."""


def strided(rows_KS: Tensor, stride: int, device: str) -> Tensor:
    """The rows in a buffer on `device`, `stride` bytes apart and as many from its start."""
    rows, nbytes = rows_KS.shape
    storage = torch.full((stride + rows * (nbytes + stride),), GAP, dtype=torch.uint8, device=device)
    buffer = storage[stride:].view(rows, nbytes + stride)
    buffer[:, :nbytes] = rows_KS.to(device)
    return buffer


def run_case(case: Case, codec: ModuleType, device: str, *, fuzz: bool = False) -> dict[str, Tensor]:
    """Every family of `codec` on the case; what it wrote, on the CPU, by name.

    fuzz: decode random bytes instead of what was encoded. The reference gets contiguous rows, the others case.stride.
    """
    case = Case(case.number, case.sweep)  # the same draws in the same order for every implementation
    layout, answer_layout, coding = case.layout, case.answer_layout, case.coding
    stride = 0 if codec is reference else case.stride
    written: dict[str, Tensor] = {}

    def place(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, copy=True)

    def place_blocks(blocks: Blocks | None) -> Blocks | None:
        return None if blocks is None else Blocks(blocks.ids_G.to(device), blocks.valid_G.to(device))

    wire = strided(case.wire_bytes(layout, layout.chunks), stride, device)
    if not fuzz:
        x, blocks = place(case.vector(layout.numel, case.dtype)), place_blocks(case.block_table(layout))
        residual, residual_scales = (place(tensor) for tensor in case.residual_tensors())
        codec.encode_bucket(
            x,
            wire,
            layout,
            coding,
            prescale=case.prescale,
            residual_N=residual,
            residual_scales_G=residual_scales,
            decay=case.decay,
            blocks=blocks,
        )
        written |= {"x": x, "residual": residual, "residual scales": residual_scales, "wire": wire}

    out = place(case.finite(layout.numel).to(case.out_dtype))
    codec.decode_bucket(wire, layout, out, coding, accumulate=case.accumulate)
    total = codec.decode_sum(wire, layout, divisor=case.divisor)
    written |= {"decoded": out, "sum": total}

    answer = strided(case.wire_bytes(answer_layout, 1), stride, device)
    residual_C = place(case.finite(layout.chunk_numel)) if case.second_hop else None
    blocks = place_blocks(case.block_table(answer_layout))
    codec.decode_sum_encode(
        wire,
        layout,
        answer[0],
        answer_layout,
        coding,
        chunk=case.chunk,
        divisor=case.divisor,
        residual_C=residual_C,
        blocks=blocks,
    )
    written |= {"answer": answer, "second-hop residual": residual_C}

    for name, rows in {"wire": layout, "answer": answer_layout}.items():
        if name in written:
            gaps = written[name][:, rows.chunk_bytes :]
            assert (gaps == GAP).all(), f"{name}: written outside its rows; {case}"
            written[name] = written[name][:, : rows.chunk_bytes]
    return {name: tensor.cpu() for name, tensor in written.items() if tensor is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    """The same bits everywhere, except that a NaN in floats may be any NaN."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        assert got.dtype == want.dtype and got.shape == want.shape, f"{name}; {case}"
        if want.is_floating_point():
            bits = torch.int32 if want.dtype == torch.float32 else torch.int16
            both_nan = got.isnan() & want.isnan()
            same = (got.view(bits) == want.view(bits)) | both_nan
        else:
            same = got == want
        if not same.all():
            where = (~same).nonzero()[0].tolist()
            raise AssertionError(
                f"{name} differs in {(~same).sum()} of {same.numel()} places, first at {where}: "
                f"{got[tuple(where)].item()}, the reference has {want[tuple(where)].item()}; {case}"
            )
