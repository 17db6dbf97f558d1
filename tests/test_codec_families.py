"""Error feedback, layouts, the reduction and the errors of the reference codecs: what the families promise together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codec_cases import FORMAT_SCALES, LEVELS
from commq.codecs import reference
from commq.codecs.formats import Format, get_format, level_format
from commq.codecs.ops import decode, encode
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout, pack, unpack
from numerics import nasty_inputs

NASTY = nasty_inputs()
FINITE = {name: x for name, x in NASTY.items() if x.isfinite().all()}
FORMATS_AND_SCALES = [get_format(name, scale=scale) if scale else get_format(name) for name, scale in FORMAT_SCALES]
FORMATS_AND_SCALES += LEVELS
BLOCK_FORMATS = [f for f in FORMATS_AND_SCALES if f.kind != "raw"]


def encode_new(x: Tensor, layout: Layout, coding: Coding, **options) -> Tensor:
    wire = torch.full((layout.chunks, layout.chunk_bytes), 0xA5, dtype=torch.uint8)
    reference.encode_bucket(x, wire, layout, coding, **options)
    return wire


def decode_new(wire: Tensor, layout: Layout, coding: Coding) -> Tensor:
    out = torch.empty(layout.numel)
    reference.decode_bucket(wire, layout, out, coding)
    return out


# Error feedback


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("fmt", [f for f in BLOCK_FORMATS if f.kind not in ("sign", "levels")], ids=str)
def test_classic_feedback_loses_nothing(fmt: Format, name: str) -> None:
    """input + old residual == sent + new residual, to the bit: nearest codes are so near that h - sent is exact."""
    x = FINITE[name]
    old = torch.randn(x.numel()) * x.abs().clamp(max=1e30).mean()
    layout, new = Layout(fmt, x.numel(), chunks=3), old.clone()
    sent = decode_new(encode_new(x, layout, Coding(), residual_N=new), layout, Coding())
    h = x + old
    assert torch.equal(h.double(), sent.double() + new.double())


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_feedback_rule_to_the_bit(fmt: Format, rotated: bool, rounding: str) -> None:
    """e <- decay * e + (1 - decay) * (h - sent), one float32 rounding an operation; decay = 0 is classic."""
    coding = Coding(rounding=rounding, rotation=Rotation(size=32, signs=True) if rotated else None, seed=1)
    layout = Layout(fmt, 3000, chunks=2, align=32)
    x, old = torch.randn(3000), torch.randn(3000)
    for decay in (0.0, 0.8):
        new = old.clone()
        sent = decode_new(encode_new(x, layout, coding, residual_N=new, decay=decay, prescale=0.3), layout, coding)
        lost = (x * 0.3 + old) - sent
        expected = old * decay + lost * (1 - decay) if decay else lost
        assert torch.equal(new, expected)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_narrow_storage_of_the_residual(fmt: Format) -> None:
    """bf16 and int8 storage hold the float32 residual as well as those formats can."""
    layout, x = Layout(fmt, 1000), torch.randn(1000)
    exact = torch.zeros(1000)
    encode_new(x, layout, Coding(), residual_N=exact)
    bf16 = torch.zeros(1000, dtype=torch.bfloat16)
    encode_new(x, layout, Coding(), residual_N=bf16)
    assert torch.equal(bf16, exact.to(torch.bfloat16))

    int8, scales_G = torch.zeros(1000, dtype=torch.int8), torch.zeros(layout.chunk_blocks)
    encode_new(x, layout, Coding(), residual_N=int8, residual_scales_G=scales_G)
    stored = reference.load_residual(int8, scales_G, fmt.block)
    step = (scales_G.repeat_interleave(fmt.block)[:1000] / 127).double()
    assert ((stored.double() - exact).abs() <= step * (0.5 + 127 * 2.0**-21)).all()
    padded = torch.nn.functional.pad(exact, (0, -1000 % fmt.block)).view(-1, fmt.block)
    assert torch.equal(scales_G[: len(padded)], padded.abs().amax(dim=1))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rotation", [None, Rotation(size=256)])
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_a_marked_block_leaves_its_residual_alone(fmt: Format, rotation: Rotation | None, storage: torch.dtype) -> None:
    numel, position = 4096, 1000
    unit = max(fmt.block, rotation.size if rotation else 1)
    layout, x = Layout(fmt, numel, align=unit), torch.randn(numel)
    x[position] = torch.inf
    old = (torch.randn(numel) * 50).to(storage)
    scales_G = torch.rand(layout.chunk_blocks) if storage == torch.int8 else None
    new, new_scales_G = old.clone(), None if scales_G is None else scales_G.clone()
    encode_new(x, layout, Coding(rotation=rotation), residual_N=new, residual_scales_G=new_scales_G)
    marked = torch.arange(numel) // unit == position // unit
    assert torch.equal(new[marked], old[marked])
    assert (new.float()[~marked] != old.float()[~marked]).float().mean() > 0.5
    if scales_G is not None and new_scales_G is not None:
        blocks_marked = marked.view(-1, fmt.block).all(dim=1)
        assert torch.equal(new_scales_G[: len(blocks_marked)] == scales_G[: len(blocks_marked)], blocks_marked)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_residuals_stay_finite(fmt: Format, name: str, storage: torch.dtype) -> None:
    x = NASTY[name]
    layout = Layout(fmt, x.numel(), align=32)
    residual = torch.zeros(x.numel(), dtype=storage)
    scales_G = torch.zeros(layout.chunk_blocks) if storage == torch.int8 else None
    for step in range(3):
        for coding in (Coding(), Coding(rounding="stochastic", step=step), Coding(rotation=Rotation(size=32))):
            encode_new(x, layout, coding, residual_N=residual, residual_scales_G=scales_G, decay=0.5)
            assert reference.load_residual(residual, scales_G, fmt.block).isfinite().all()


# Layouts


@pytest.mark.parametrize("numel", [0, 1, 127, 128, 100_003])
@pytest.mark.parametrize("fmt", FORMATS_AND_SCALES, ids=str)
def test_layout_of_1_to_17_chunks(fmt: Format, numel: int) -> None:
    for chunks in range(1, 18):
        layout = Layout(fmt, numel, chunks, align=32)
        assert layout.chunk_numel % layout.unit == 0 and layout.unit % 32 == 0
        assert sum(layout.valid(c) for c in range(chunks)) == numel
        assert layout.nbytes == chunks * layout.chunk_bytes
        # Whole units, and no more of them than one extra for each chunk.
        assert numel <= chunks * layout.chunk_numel < numel + chunks * layout.unit + 1
        if fmt.kind == "raw":
            assert layout.chunk_bytes * 8 == layout.chunk_numel * fmt.bits
        else:
            assert layout.scales_offset % 16 == layout.groups_offset % 16 == layout.chunk_bytes % 16 == 0
            padding = layout.chunk_bytes - layout.chunk_numel * fmt.bits_per_element / 8
            assert 0 <= padding < 48  # three sections, each padded to 16 bytes


@pytest.mark.parametrize("fmt", FORMATS_AND_SCALES, ids=str)
def test_each_row_decodes_alone_and_every_byte_of_it_is_written(fmt: Format) -> None:
    numel, chunks = 5001, 7
    layout, x = Layout(fmt, numel, chunks), torch.randn(numel)
    wire = torch.full((chunks, layout.chunk_bytes + 5), 0xA5, dtype=torch.uint8)
    reference.encode_bucket(x, wire, layout, Coding())
    assert (wire[:, layout.chunk_bytes :] == 0xA5).all()
    other = torch.zeros_like(wire)
    reference.encode_bucket(x, other, layout, Coding())
    assert torch.equal(wire[:, : layout.chunk_bytes], other[:, : layout.chunk_bytes])
    whole = decode_new(wire[:, : layout.chunk_bytes].clone(), layout, Coding())
    for chunk in range(chunks):
        row = wire[chunk : chunk + 1, : layout.chunk_bytes].clone()
        start, valid = chunk * layout.chunk_numel, layout.valid(chunk)
        alone = reference.decode_sum(row, layout)
        assert torch.equal(alone[:valid], whole[start : start + valid])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_pack_puts_the_first_code_in_the_low_bits(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 64))
    packed = pack(codes, bits)
    assert packed.shape == (3, 64 * bits // 8) and torch.equal(unpack(packed, bits).long(), codes)
    first = torch.zeros(1, 8, dtype=torch.int64)
    first[0, 0] = 1
    assert pack(first, bits)[0, 0] == 1


# Reduction


@pytest.mark.parametrize("fmt", [f for f in FORMATS_AND_SCALES if f.fit == "largest"], ids=str)
def test_average_of_ones_is_one_for_any_number_of_ranks(fmt: Format) -> None:
    for ranks in range(1, 18):
        layout = Layout(fmt, 300, ranks)
        message = encode_new(torch.ones(300), layout, Coding())[:1].expand(ranks, -1)
        answer = torch.empty(layout.chunk_bytes, dtype=torch.uint8)
        reference.decode_sum_encode(message, layout, answer, layout, Coding(), chunk=0, divisor=float(ranks))
        valid = layout.valid(0)
        assert torch.equal(reference.decode_sum(answer[None], layout)[:valid], torch.ones(valid))


@pytest.mark.parametrize("out", ["int4", "fp8_e5m2", "bf16"])
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_decode_sum_encode_is_its_parts(fmt: Format, out: str) -> None:
    """The same bytes as decoding, adding in order, dividing, and encoding with feedback."""
    answer_fmt, ranks, numel = get_format(out), 5, 4000
    align = max(fmt.unit, answer_fmt.unit)
    layout, answer_layout = (Layout(f, numel, ranks, align=align) for f in (fmt, answer_fmt))
    messages = torch.cat([encode_new(torch.randn(numel), layout, Coding())[2:3] for _ in range(ranks)])
    residual = torch.randn(layout.chunk_numel)
    total = sum(
        (reference.decode_sum(row[None], layout) for row in messages[1:]), reference.decode_sum(messages[:1], layout)
    )
    h = total / torch.full_like(total, 5.0) + residual
    answer = torch.empty(answer_layout.chunk_bytes, dtype=torch.uint8)
    reference.decode_sum_encode(
        messages, layout, answer, answer_layout, Coding(), chunk=2, divisor=5.0, residual_C=residual
    )
    alone = Layout(answer_fmt, layout.chunk_numel, align=align)
    assert torch.equal(answer[None], encode_new(h, alone, Coding()))
    assert torch.equal(residual, h - reference.decode_sum(answer[None], answer_layout))


@pytest.mark.parametrize("name", ["int4", "nvfp4", "sign"])
def test_the_answers_random_bits_follow_the_chunk(name: str) -> None:
    """Encoding chunk by chunk gives the bytes of encoding the whole: bits belong to blocks, not to buffers."""
    fmt, numel, ranks = get_format(name), 3000, 3
    plain, layout = Layout(get_format("fp32"), numel, ranks, align=fmt.unit), Layout(fmt, numel, ranks)
    coding, x = Coding(rounding="stochastic", seed=1, stream=2), torch.randn(numel)
    whole, raw = encode_new(x, layout, coding), encode_new(x, plain, Coding())
    for chunk in range(ranks):
        answer = torch.empty(layout.chunk_bytes, dtype=torch.uint8)
        reference.decode_sum_encode(raw[chunk : chunk + 1], plain, answer, layout, coding, chunk=chunk)
        assert torch.equal(answer, whole[chunk])


@pytest.mark.parametrize("rotation", [None, Rotation(size=64, signs=True)])
@pytest.mark.parametrize("fmt", FORMATS_AND_SCALES, ids=str)
def test_random_bytes_decode(fmt: Format, rotation: Rotation | None) -> None:
    if fmt.kind == "raw":
        rotation = None
    for numel in (1, 1000):
        layout = Layout(fmt, numel, chunks=3, align=64)
        wire = torch.randint(256, (3, layout.chunk_bytes), dtype=torch.uint8)
        decode_new(wire, layout, Coding(rotation=rotation))
        answer = torch.empty(layout.chunk_bytes, dtype=torch.uint8)
        residual = torch.zeros(layout.chunk_numel)
        reference.decode_sum_encode(wire, layout, answer, layout, Coding(), chunk=1, residual_C=residual)
        assert residual.isfinite().all()


# The public pair, and what is refused


@pytest.mark.parametrize("fmt", FORMATS_AND_SCALES, ids=str)
def test_encode_and_decode_keep_shape_and_dtype(fmt: Format) -> None:
    for shape in ((), (0,), (3, 5, 7), (1, 4096)):
        x = torch.randn(shape)
        rotation = None if fmt.fit == "largest" else 64
        encoded = encode(x, fmt, rotation=rotation)
        assert encoded.wire.numel() == encoded.layout.nbytes
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            back = decode(encoded, dtype)
            assert back.shape == x.shape and back.dtype == dtype
    transposed = torch.randn(64, 48).t()
    arrived, expected = (decode(encode(x, fmt, rotation=rotation)) for x in (transposed, transposed.contiguous()))
    assert torch.equal(arrived, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_format("int5"), ValueError, "'int5' is unknown; expected one of fp32"),
        (lambda: get_format("int4", block=100), ValueError, "block=100 for format 'int4'"),
        (lambda: get_format("int4", block=8), ValueError, "power of two from 16 to 4096"),
        (lambda: get_format("mxfp4", scale="fp32"), ValueError, "expected one of e8m0"),
        (lambda: get_format("bf16", block=128), ValueError, "'bf16' is raw"),
        (lambda: Rotation(size=48), ValueError, "size=48: expected a power of two from 16 to 1024"),
        (lambda: Layout(get_format("int8"), -1), ValueError, "numel=-1"),
        (lambda: Layout(get_format("int8"), 1, chunks=0), ValueError, "chunks=0"),
        (lambda: encode(torch.arange(5), "int8"), TypeError, "int64, expected float32"),
        (lambda: encode(torch.ones(5), "int8", rounding="up"), ValueError, "rounding='up'"),
        (lambda: encode(torch.ones(5), "fp16", rounding="stochastic"), ValueError, "'fp16'"),
        (lambda: encode(torch.ones(5), "bf16", rotation=32), ValueError, "drop the rotation"),
        (lambda: encode(torch.ones(5), "int8", backend="fast"), ValueError, "backend='fast'"),
        (lambda: encode(torch.ones(5), "eden2"), ValueError, "expected rounding='nearest' and a rotation"),
        (lambda: encode(torch.ones(5), "eden2", rounding="stochastic", rotation=64), ValueError, "'eden2'"),
        (lambda: level_format("mine", 2, (-1.0, 0.0, 0.5, 0.75, 1.0)), ValueError, "found 5, expected 2 to 4"),
        (lambda: level_format("mine", 2, (-0.5, 0.5)), ValueError, "levels from -1 to 1"),
        (lambda: level_format("mine", 5, (-1.0, 1.0)), ValueError, "bits=5"),
        (lambda: replace(get_format("eden2"), spread=0.0), ValueError, "fit='unbiased' with spread=0.0"),
        (lambda: encode(torch.ones(5), "dynamic8", backend="native"), RuntimeError, "at most 16 levels"),
        (lambda: decode(encode(torch.ones(5), "int8"), torch.int32), TypeError, "int32"),
    ],
)
def test_errors_say_what_was_found_and_what_is_expected(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_decode_refuses_a_wire_of_another_length() -> None:
    encoded = encode(torch.ones(300), "int8")
    short = type(encoded)(encoded.wire[:-1], encoded.layout, encoded.coding, encoded.shape)
    with pytest.raises(ValueError, match="expected uint8"):
        decode(short)
