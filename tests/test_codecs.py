"""The contract of commq/codecs/reference.py: error bounds, exact values, error feedback, what is not finite.

That the other implementations give the same bytes is held by test_codecs_same_bytes.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codec_cases import FORMAT_SCALES, LEVELS
from commq.codecs import reference
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS, Format, get_format
from commq.codecs.philox import philox, random_signs, random_u16
from commq.codecs.reference import Blocks, Coding
from commq.codecs.rotation import Rotation, rotate, unrotate
from commq.codecs.rounding import code_values, float_codes, integer_codes, level_codes, sign_codes, top_code
from commq.codecs.wire import Layout
from numerics import nasty_inputs

NASTY = nasty_inputs()
FINITE = {name: x for name, x in NASTY.items() if x.isfinite().all()}
SPIKES = [
    get_format(f"spike{bits}", block=block, scale=scale)
    for bits, block, scale in (
        (2, 16, "fp32x3"),
        (2, 128, "bf16x3"),
        (3, 64, "bf16x3"),
        (4, 256, "fp32x3"),
        (5, 128, "bf16x3"),
        (6, 16, "bf16x3"),
        (7, 128, "fp32x3"),
        (8, 256, "bf16x3"),
    )
]
BLOCK_FORMATS = [f for f in (*FORMATS.values(), *LEVELS, *SPIKES) if f.kind != "raw"]
EVERY = [
    get_format(name, block=block, scale=scale) if scale else get_format(name)
    for name, scale in FORMAT_SCALES
    for block in ((16, 128, 4096) if scale else (None,))
] + [*LEVELS, *SPIKES]
"""Every format with every scale dtype it can have, at a small, a usual and the largest block."""


def wire_for(layout: Layout) -> Tensor:
    return torch.full((layout.chunks, layout.chunk_bytes), 0xA5, dtype=torch.uint8)


def sent(x: Tensor, fmt: Format, coding: Coding = Coding(), blocks: Blocks | None = None) -> Tensor:  # noqa: B008
    """What arrives of x."""
    layout = Layout(fmt, x.numel(), align=coding.rotation.size if coding.rotation else 1)
    wire, out = wire_for(layout), torch.empty(x.numel())
    reference.encode_bucket(x, wire, layout, coding, blocks=blocks)
    reference.decode_bucket(wire, layout, out, coding)
    return out


def modes(fmt: Format) -> list[str]:
    return ["nearest", "stochastic"] if fmt.unbiased else ["nearest"]


def survives(fmt: Format) -> bool:
    """Whether the largest value of a block arrives as it was, whatever its sign."""
    return fmt.scale in ("fp32", "fp32x3") and fmt.kind not in ("raw", "sign") and fmt.fit == "largest"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


# Random bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    """The known answers that Random123 is shipped with."""
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(word.item() for word in words) == expected


def test_random_bits_follow_the_block_number() -> None:
    ids = torch.tensor([7, 0, 2**40])
    together = random_u16(ids, 64, seed=1, step=2, stream=3)
    for row, block in zip(together, ids, strict=True):
        assert torch.equal(row, random_u16(block[None], 64, seed=1, step=2, stream=3)[0])
    # Block 7 of 64 elements is blocks 14 and 15 of 32: the bits belong to elements.
    assert torch.equal(together[0], random_u16(torch.tensor([14, 15]), 32, seed=1, step=2, stream=3).view(-1))
    others = [{"seed": 4}, {"step": 4}, {"step": 2 + 2**32}, {"stream": 4}]
    for other in others:
        assert not torch.equal(together, random_u16(ids, 64, **{"seed": 1, "step": 2, "stream": 3, **other}))


def test_random_signs_are_fair_and_change_with_the_step() -> None:
    signs = random_signs(1024, seed=5, step=6, stream=7, device=torch.device("cpu"))
    assert signs.abs().eq(1).all() and abs(signs.sum().item()) < 5 * math.sqrt(1024)
    assert not torch.equal(signs, random_signs(1024, seed=5, step=7, stream=7, device=torch.device("cpu")))


# Codes and their values


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_the_largest_code_times_its_inverse_is_one(fmt: Format) -> None:
    for largest in {fmt.max_code, 448.0, 127.0}:  # also those of e4m3 scales and of int8 residuals
        assert (torch.tensor(largest) * torch.tensor(1.0 / largest)).item() == 1.0


def test_e2m1_values() -> None:
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.tensor([*half, *(-v for v in half)])
    values = code_values(torch.arange(16, dtype=torch.uint8), FORMATS["mxfp4"])
    assert torch.equal(bits(values), bits(expected))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_codes_are_those_of_torch(name: str) -> None:
    fmt = FORMATS[name]
    dtype = torch.float8_e4m3fn if fmt.mantissa == 3 else torch.float8_e5m2
    finite = torch.arange(256, dtype=torch.uint8)
    finite = finite[(finite & 0x7F) <= top_code(fmt)]
    values = code_values(finite, fmt)
    midpoints = (values[1 : top_code(fmt) + 1] + values[: top_code(fmt)]) / 2  # ties
    t = torch.cat((values, midpoints, -midpoints, torch.randn(10000) * 2.0 ** torch.randint(-20, 8, (10000,))))
    t = t.clamp(-fmt.max_code, fmt.max_code)
    codes = float_codes(t, fmt.exponent, fmt.mantissa, top_code(fmt), None).to(torch.uint8)
    assert torch.equal(codes, t.to(dtype).view(torch.uint8))


def test_e2m1_codes_are_nearest_and_ties_go_to_even() -> None:
    fmt = FORMATS["mxfp4"]
    values = code_values(torch.arange(8, dtype=torch.uint8), fmt)
    t = torch.linspace(0, 6, 6 * 64 + 1)  # every tie is among them
    codes = float_codes(t, 2, 1, 7, None)
    distance = (t[:, None] - values).abs()
    nearest = distance == distance.amin(dim=1, keepdim=True)
    assert nearest.gather(1, codes[:, None].long()).all()
    assert (codes[nearest.sum(dim=1) == 2] % 2 == 0).all()


# Error bounds and exact values


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_error_bound_holds_for_every_element(fmt: Format, name: str) -> None:
    x = FINITE[name]
    if fmt.name == "fp16":
        x = x.clamp(-65504, 65504)
    if fmt.name == "bf16":
        x = x.clamp(-torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).max)
    for rounding in modes(fmt):
        error = (x.double() - sent(x, fmt, Coding(rounding=rounding, seed=1)).double()).abs()
        excess = error - error_bound(x, fmt, rounding=rounding)
        assert excess.max() <= 0, f"{rounding}: {excess.max()} above the bound at {excess.argmax()}"


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_nearest_rounding_is_a_contraction_of_each_block(fmt: Format) -> None:
    x = torch.cat([torch.randn(8192), torch.randn(8192) ** 5, torch.zeros(4096).index_fill(0, torch.tensor([9]), 3.0)])
    lost = (x.double() - sent(x, fmt).double()).view(-1, fmt.block).square().sum(dim=1)
    assert (lost <= fmt.contraction * x.double().view(-1, fmt.block).square().sum(dim=1)).all()


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.fit == "largest"], ids=str)
def test_ones_and_zeros_are_exact(fmt: Format) -> None:
    for rounding in modes(fmt):
        coding = Coding(rounding=rounding, seed=3)
        for numel in (1, 127, 5000):
            ones = torch.ones(numel)
            assert torch.equal(sent(ones, fmt, coding), ones)
            assert torch.equal(sent(-ones, fmt, coding), -ones)
            assert torch.equal(sent(ones * 0, fmt, coding), ones * 0)
        # A block of zeros beside others stays zero, whatever the group's scale is.
        x = torch.cat((torch.randn(fmt.block), torch.zeros(fmt.block)))
        assert (sent(x, fmt, coding)[fmt.block :] == 0).all()


@pytest.mark.parametrize("fmt", [f for f in EVERY if survives(f)], ids=str)
def test_the_largest_value_of_a_block_survives(fmt: Format) -> None:
    x = torch.randn(8192) * torch.logspace(-30, 30, 8192 // fmt.block).repeat_interleave(fmt.block)
    blocks_GB, arrived_GB = x.view(-1, fmt.block), sent(x, fmt).view(-1, fmt.block)
    largest = blocks_GB.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(arrived_GB.gather(1, largest), blocks_GB.gather(1, largest))


# Stochastic rounding


@pytest.mark.parametrize("fmt", [f for f in BLOCK_FORMATS if f.unbiased], ids=str)
def test_stochastic_rounding_takes_the_two_neighbours_with_the_right_frequency(fmt: Format) -> None:
    """All 2**16 random numbers for each t: nothing but the neighbours, and the mean is t within 2**-17 of a step."""
    random = torch.arange(1 << 16)[:, None]
    t = torch.cat((torch.tensor([0.0, 1.0, -1.0, 0.3]), (torch.rand(28) * 2 - 1) * fmt.max_code))
    t = t.clamp(-fmt.max_code, fmt.max_code)
    grid = code_values(torch.arange(1 << fmt.bits).to(torch.uint8), fmt)
    grid = grid[grid.abs() <= fmt.max_code].unique().double()
    if fmt.kind in ("integer", "spikes"):
        values = integer_codes(t.expand(1 << 16, -1), fmt, random)
    elif fmt.kind == "levels":
        values = code_values(level_codes(t.expand(1 << 16, -1), fmt, random), fmt)
    elif fmt.kind == "sign":
        values = sign_codes(t.expand(1 << 16, -1), random) * 2 - 1
    else:
        codes = float_codes(t.expand(1 << 16, -1), fmt.exponent, fmt.mantissa, top_code(fmt), random)
        values = code_values(codes.to(torch.uint8), fmt)
    index = torch.searchsorted(grid, t.double())
    above = grid[index]
    below = torch.where(above == t, above, grid[(index - 1).clamp(min=0)])
    assert ((values == above) | (values == below)).all()
    assert ((values.double().mean(dim=0) - t).abs() <= (above - below) * 2.0**-17 + 2.0**-23 * t.abs()).all()


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.unbiased and f.block <= 128], ids=str)
def test_stochastic_rounding_is_unbiased(fmt: Format) -> None:
    x = torch.randn(2048)
    trials = 200
    draws = torch.stack([sent(x, fmt, Coding(rounding="stochastic", seed=2, step=k)) for k in range(trials)]).double()
    spread = error_bound(x, fmt, rounding="stochastic")  # half the range of a draw, so its deviation is at most this
    assert ((draws.mean(dim=0) - x).abs() <= 5.5 * spread / math.sqrt(trials)).all()
    # Summed over the elements a bias of all of them would stand out.
    assert (draws.mean(dim=0) - x).sum().abs() <= 5.5 * spread.square().sum().sqrt() / math.sqrt(trials)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_random_bits_do_not_depend_on_the_bucket(name: str) -> None:
    """Two parameters in one bucket, or each alone, give the same codes if their blocks have the same numbers."""
    fmt = get_format(name)
    coding = Coding(rounding="stochastic", seed=4)
    first, second = torch.randn(3 * fmt.unit), torch.randn(2 * fmt.unit)
    per_unit = fmt.unit // fmt.block

    def numbered(start: int, count: int) -> Blocks:
        return Blocks(torch.arange(start, start + count), torch.full((count,), fmt.block, dtype=torch.int32))

    whole = numbered(100, 3 * per_unit), numbered(7000, 2 * per_unit)
    both = Blocks(*(torch.cat(parts) for parts in zip(*((b.ids_G, b.valid_G) for b in whole), strict=True)))
    together = sent(torch.cat((first, second)), fmt, coding, both)
    assert torch.equal(together[: first.numel()], sent(first, fmt, coding, whole[0]))
    assert torch.equal(together[first.numel() :], sent(second, fmt, coding, whole[1]))


# Numbers that are not finite


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("fmt", [f for f in EVERY if f.kind != "raw"], ids=str)
def test_what_is_not_finite_marks_its_block_and_no_other(fmt: Format, bad: float) -> None:
    x = torch.randn(3 * fmt.unit)
    position = fmt.unit + fmt.block // 2
    x[position] = bad
    for rounding in modes(fmt):
        coding = Coding(rounding=rounding, seed=1)
        arrived_GB = sent(x, fmt, coding).view(-1, fmt.block)
        marked_G = torch.arange(len(arrived_GB)) == position // fmt.block
        assert arrived_GB[marked_G].isnan().all()
        assert arrived_GB[~marked_G].isfinite().all()
        # The other blocks are as if the marked one held zeros.
        clean = x.clone().view(-1, fmt.block)
        clean[marked_G] = 0
        assert torch.equal(arrived_GB[~marked_G], sent(clean.view(-1), fmt, coding).view(-1, fmt.block)[~marked_G])


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_raw_formats_pass_on_what_is_not_finite(name: str) -> None:
    x = torch.tensor([1.0, math.inf, -math.inf, math.nan, 0.0])
    arrived = sent(x, get_format(name))
    assert torch.equal(arrived.nan_to_num(nan=5.0, posinf=6.0, neginf=7.0), torch.tensor([1.0, 6.0, 7.0, 5.0, 0.0]))


# Rotation


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512, 1024])
def test_rotation_is_orthogonal_and_exact_on_small_integers(size: int, signs: bool) -> None:
    rotation = Rotation(size=size, signs=signs)
    pattern = rotation.sign_pattern(seed=1, step=2, device=torch.device("cpu"))
    x = torch.randint(-8, 9, (4 * size,)).float()
    assert torch.equal(unrotate(rotate(x, rotation, pattern), rotation, pattern), x)
    # y = H x 2**-floor(log2(n) / 2): a multiple of an isometry, exactly.
    gain = 2.0 ** (size.bit_length() - 1 - 2 * ((size.bit_length() - 1) // 2))
    y = rotate(x, rotation, pattern).double()
    assert torch.equal(y.view(4, -1).square().sum(1), gain * x.double().view(4, -1).square().sum(1))


@pytest.mark.parametrize("size", [16, 32, 128, 1024])
@pytest.mark.parametrize("fmt", [f for f in EVERY if survives(f) and f.name != "three"], ids=str)
def test_ones_are_exact_through_a_rotation(fmt: Format, size: int) -> None:
    ones = torch.ones(5 * size)
    assert torch.equal(sent(ones, fmt, Coding(rotation=Rotation(size=size))), ones)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_rotated_error_is_bounded_in_each_run(fmt: Format) -> None:
    rotation = Rotation(size=64, signs=True)
    coding = Coding(rotation=rotation, seed=6)
    x = torch.randn(4096) ** 3
    pattern = rotation.sign_pattern(seed=6, step=0, device=torch.device("cpu"))
    bound_N = error_bound(rotate(x, rotation, pattern), fmt)
    error = (x.double() - sent(x, fmt, coding)).view(-1, 64).square().sum(1).sqrt()
    slack = 1e-6 * x.double().view(-1, 64).square().sum(1).sqrt()  # float32 butterflies
    assert (error <= bound_N.view(-1, 64).square().sum(1).sqrt() + slack).all()
