"""Rows are integers: every format, uneven lengths, every number of ranks, no processes."""

import itertools

import pytest
import torch

from commq.codecs.formats import FORMATS, get_format
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.collectives.memory import Memory
from commq.collectives.plan import RAW
from commq.collectives.rows import CUT, RowCodec, Rows, RowTensors, cut

RANKS = range(1, 18)
LISTS = ([1000], [0], [1, 127, 1003], [128, 0, 5000, 100_003], [4096] * 5, [1] * 17, [0, 0, 300_000], [256, 256, 255])


def rows_of(lengths, name, dtype=torch.float32, **options):
    return Rows(tuple(lengths), dtype, get_format(name), **options)


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_cover_every_row_once_in_order(name):
    for lengths in LISTS:
        rows = rows_of(lengths, name)
        for piece_bytes in (1 << 10, 1 << 16, 1 << 22, None):
            reached = [0] * len(lengths)
            for piece in cut(rows, piece_bytes):
                offset = elements = 0
                for run in piece.runs:
                    assert run.offset == offset and run.start == reached[run.row]
                    assert run.numel == 0 or run.start % CUT == CUT % rows.unit == 0, "a cut inside of a block"
                    offset += run.layout.nbytes
                    elements += run.numel
                    reached[run.row] += run.numel
                assert piece.nbytes == sum(piece.splits) == offset
                if piece_bytes is not None:
                    assert elements and 4 * elements <= max(piece_bytes * 5 / 4, 4 * CUT * len(lengths))
            assert reached == list(lengths)
    assert len(cut(rows_of([0, 0], name), None)) == 1, "a move that other ranks make, too"
    assert cut(rows_of([0, 0], name), 1 << 20) == ()


@pytest.mark.parametrize("dtype", RAW)
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_ever_grows(name, dtype):
    """Bytes of a row <= the bytes of its elements, cut or not, for every length."""
    raw = FORMATS[name].kind == "raw"
    formats = [get_format(name)] if raw else [get_format(name, block=block) for block in (16, 128, 4096)]
    for lengths, fmt in itertools.product(
        (*LISTS, range(0, 600, 7), range(4096, 4116), range(8200, 9000, 23)), formats
    ):
        for align in (1,) if raw else (1, 1024):
            for piece_bytes in (1, None):
                sent = [0] * len(lengths)
                for piece in cut(Rows(tuple(lengths), dtype, fmt, align), piece_bytes):
                    sent = [a + b for a, b in zip(sent, piece.splits, strict=True)]
                assert all(s <= n * dtype.itemsize for s, n in zip(sent, lengths, strict=True)), lengths


def test_a_row_is_raw_where_encoding_would_not_make_it_smaller():
    rows = rows_of([0, 1, 35, 36, 37, 10_000], "int8")  # a block and its scale take 128 + 16 bytes
    assert [fmt.name for fmt in rows.formats] == ["fp32", "fp32", "fp32", "fp32", "int8", "int8"]
    assert {fmt.name for fmt in rows_of([1000], "fp32", torch.bfloat16).formats} == {"bf16"}
    assert {fmt.name for fmt in rows_of([1000], "bf16", torch.float16).formats} == {"fp16"}


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("name", FORMATS)
def test_one_call_for_all_rows_says_the_same_bytes(name, world_size):
    unit = get_format(name).unit
    (piece,) = cut(rows_of([3 * unit] * world_size, name), None)
    assert piece.together is not None and piece.together.nbytes == piece.nbytes and piece.even
    if unit > 1:
        assert all(run.layout.nbytes == piece.together.chunk_bytes for run in piece.runs)
        assert piece.together.chunk_numel == 3 * unit
        assert world_size == 1 or cut(rows_of([3 * unit + 1] * world_size, name), None)[0].together is None
        assert world_size == 1 or cut(rows_of([unit] + [2 * unit] * (world_size - 1), name), None)[0].together is None
    assert cut(rows_of([unit] * world_size, name, kept=0), None)[0].together is None


def test_blocks_of_all_rows_have_numbers_of_their_own_wherever_rows_are_cut():
    for name in ("int4", "mxfp8", "nvfp4"):
        for lengths in LISTS:
            rows = rows_of(lengths, name, align=64)
            numbers = []
            for piece_bytes in (None, 1 << 14, 1 << 11):
                blocks = [
                    (run.row, run.start // rows.format.block + i, run.first_block + i)
                    for piece in cut(rows, piece_bytes)
                    for run in piece.runs
                    for i in range(-(-run.numel // rows.format.block))
                ]
                assert len({number for *_, number in blocks}) == len(blocks)
                numbers.append(sorted(blocks))
            assert numbers[0] == numbers[1] == numbers[2]


def test_the_row_that_stays_takes_no_bytes_and_no_numbers_change():
    lengths = [300, 5000, 128, 777]
    everything, kept = cut(rows_of(lengths, "int4"), None)[0], cut(rows_of(lengths, "int4", kept=1), None)[0]
    assert kept.splits == [n if row != 1 else 0 for row, n in enumerate(everything.splits)]
    assert [run.first_block for run in kept.runs] == [run.first_block for run in everything.runs]


def test_rows_counted_from_the_first_element_are_not_cut():
    (piece,) = cut(rows_of([100_000, 7, 0], "bf16", whole=True), 1 << 10)
    assert piece.together is not None and piece.together.numel == 100_007


def codec_of(name, **coding):
    return RowCodec(get_format(name), Coding(**coding), torch.device("cpu"), Memory(), "auto")


@pytest.mark.parametrize("rotation", [None, Rotation(size=64)])
@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.unbiased])
def test_together_and_row_by_row_give_the_same_bytes(name, rotation):
    if FORMATS[name].kind == "raw" and rotation:
        return
    codec = codec_of(name, rounding="stochastic", rotation=rotation, seed=1, step=2, stream=4)
    for lengths in ([512] * 3, [1, 300, 0, 1003]):
        x = RowTensors.split(torch.randn(sum(lengths)), lengths)
        (piece,) = codec.pieces(lengths, torch.float32)
        wires = []
        for rows in (x, RowTensors(x.rows)) if not codec.whole else (x,):
            wires.append(torch.full((piece.nbytes,), 0xA5, dtype=torch.uint8))
            codec.encode(piece, rows, wires[-1])
        assert torch.equal(wires[0], wires[-1])
        outs = [RowTensors.split(torch.empty(sum(lengths)), lengths) for _ in range(2)]
        codec.decode(piece, wires[0], outs[0])
        codec.decode(piece, wires[0], RowTensors(outs[1].rows))
        assert torch.equal(outs[0].flat, outs[1].flat)


@pytest.mark.parametrize("name", ["int4", "bf16"])
def test_rows_with_the_same_elements_get_other_random_bits(name):
    codec, length = codec_of(name, rounding="stochastic"), 1000
    x = RowTensors.split(torch.randn(length).repeat(3), [length] * 3)
    (piece,) = codec.pieces([length] * 3, torch.float32)
    wire, out = torch.empty(piece.nbytes, dtype=torch.uint8), torch.empty(3, length)
    codec.encode(piece, x, wire)
    codec.decode(piece, wire, RowTensors.split(out.view(-1), [length] * 3))
    assert not any(torch.equal(out[a], out[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
