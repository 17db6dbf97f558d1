"""Tiles of 4 and 3 bits: within their bound, zeros and NaN as promised, outliers taken away, any bytes decode."""

import pytest
import torch

from commq.codecs import ops, tiles
from commq.codecs.tiles import TILE, TileLayout, decode_tiles, encode_tiles, tile_steps
from interpreted import interpreted
from numerics import nasty_inputs, paired
from tile_cases import crosses_alike, decodes_alike, harder_inputs, outliers


def cross(x, layout, dtype=torch.float32):
    wire = torch.empty(layout.nbytes, dtype=torch.uint8).fill_(0xA5)
    encode_tiles(x, wire, layout)
    out = torch.empty(layout.numel, dtype=dtype)
    decode_tiles(wire, layout, out)
    return out, wire


def in_tiles(x_N):
    return torch.nn.functional.pad(x_N.to(torch.float64), (0, -x_N.numel() % TILE)).view(-1, TILE)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", nasty_inputs())
def test_within_the_bound_and_not_finite_is_nan(name, share):
    x = nasty_inputs()[name]
    layout = TileLayout(x.numel(), share)
    out, wire = cross(x, layout)
    marked = ~in_tiles(x).isfinite().all(dim=-1)
    assert torch.equal(in_tiles(out).isnan().any(dim=-1), marked)
    step, rotated = tile_steps(wire, layout)
    lost, largest = in_tiles(x)[~marked] - in_tiles(out)[~marked], in_tiles(x)[~marked].abs().amax(dim=-1)
    # float32 rounding of the codes and of a butterfly, and scales below the normal numbers.
    slack = largest * 2.0**-20 + 2.0**-126
    step, rotated = step[~marked].double(), rotated[~marked]
    assert bool((lost.abs().amax(dim=-1)[~rotated] <= (step / 2 + slack)[~rotated]).all())
    assert bool((lost.norm(dim=-1)[rotated] <= (TILE**0.5 * step / 2 + 8 * slack)[rotated]).all())


def test_zeros_and_nothing_are_exact():
    for numel in (0, 1, 63, 64, 1000):
        out, _ = cross(torch.zeros(numel), TileLayout(numel))
        assert torch.equal(out, torch.zeros(numel))


def test_an_outlier_does_not_cost_its_tile():
    x = torch.randn(TILE, generator=torch.Generator().manual_seed(0))
    plain, _ = cross(x, TileLayout(TILE))
    x[17] = 300.0
    out, wire = cross(x, TileLayout(TILE))
    assert bool(tile_steps(wire, TileLayout(TILE))[1].all())
    rest = torch.arange(TILE) != 17
    assert float((x - out)[rest].norm()) <= 2 * float((x - plain)[rest].norm() + 0.5)
    step = 300.0 / 15  # without a rotation
    assert float((x - out)[rest].norm()) < 0.1 * step * 63**0.5 / 12**0.5


def test_narrow_tiles_are_those_of_the_least_range():
    x = torch.randn(10, TILE, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 11)[:, None]
    layout = TileLayout(x.numel(), 0.3)
    _, wire = cross(x.view(-1), layout)
    assert torch.equal(wire[:10] >> 7, torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8))
    assert layout.nbytes == 10 * 5 + 7 * 32 + 3 * 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    layout = TileLayout(1000)
    out, wire = cross(x, layout, dtype)
    exact, same = cross(x.float(), layout)
    assert torch.equal(wire, same) and torch.equal(out, exact.to(dtype))


def test_any_bytes_decode():
    layout = TileLayout(1000)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        wire = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=generator)
        decode_tiles(wire, layout, torch.empty(1000))


@pytest.fixture(scope="module")
def kernels():
    return interpreted("commq.codecs.triton_pivots")


WAYS = [(share, dtype) for share in (0.2, 0.0, 1.0) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
@pytest.mark.parametrize(("name", "way"), paired(harder_inputs(), WAYS, 0) + paired(harder_inputs(), WAYS[:3], 1))
def test_triton_interpreted(kernels, name, way):
    share, dtype = way
    x = harder_inputs()[name].to(dtype)
    crosses_alike(kernels, x, TileLayout(x.numel(), share))


@pytest.mark.parametrize("tau", [1.0, 1.1, 20.0])
def test_triton_interpreted_in_several_chunks(kernels, monkeypatch, tau):
    """More tiles than the programs that see all of them hold at a time."""
    monkeypatch.setattr(kernels, "_CHUNK", 128)
    x = outliers(300 * TILE + 1, torch.Generator().manual_seed(5))
    x[: 80 * TILE] = x[: 2 * TILE].repeat(40)
    crosses_alike(kernels, x.bfloat16(), TileLayout(x.numel(), 0.3), tau=tau)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes_decode_alike_in_triton(kernels):
    generator = torch.Generator().manual_seed(6)
    for share in (0.0, 0.5, 1.0):
        layout = TileLayout(1000, share)
        wire = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            decodes_alike(kernels, wire, layout, dtype)


def test_the_choice_of_an_implementation():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ops.tile_implementation("auto", cpu) is tiles is ops.tile_implementation("reference", cuda)
    with pytest.raises(RuntimeError, match="the native library does not have tiles"):
        ops.tile_implementation("native", cpu)
    with pytest.raises(RuntimeError, match="backend='triton': "):
        ops.tile_implementation("triton", cpu)
