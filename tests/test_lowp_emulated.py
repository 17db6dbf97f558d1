"""Emulated GEMMs: operands are the codecs' values, products theirs; unbiased ones are, and naive ones fail."""

import math

import pytest
import torch

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS
from commq.codecs.rotation import Rotation
from commq.lowp.emulate import emulated, gain
from commq.lowp.gemm import gemm, precision
from commq.lowp.operand import OUTLIER, operand
from commq.lowp.product import Plan, Product
from commq.lowp.quantize import Counter, quantized, rotated
from commq.lowp.recipes import PRECISIONS
from numerics import nasty_inputs

CODED = [name for name, fmt in FORMATS.items() if fmt.kind in ("integer", "float")]


def counter(step=0, stream=0):
    return Counter(0, stream, torch.tensor(step))


def counters(step=0):
    return counter(step, 0), counter(step, 1), counter(step, 2)


@pytest.mark.parametrize("name", [name for name in CODED if not FORMATS[name].group])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tiles_along_the_contraction_are_the_codecs_blocks(name, rounding):
    block = FORMATS[name].block
    for what, x in nasty_inputs().items():
        x_RC = torch.nn.functional.pad(x, (0, -len(x) % (4 * block))).view(4, -1)
        encoded = commq.encode(x_RC, name, rounding=rounding, step=9, stream=3, backend="reference")
        found = quantized(
            x_RC, operand(f"{name}/1x{block}" + ":stochastic" * (rounding == "stochastic")), counter(9, 3)
        )
        expected = commq.decode(encoded, backend="reference")
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)), what


@pytest.mark.parametrize("tile", ["tensor", "row", "1x128", "32x32", "128x128"])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_any_tile_obeys_the_codecs_bound(name, tile):
    x = torch.randn(70, 150) * torch.logspace(-3, 3, 150)
    found = quantized(x, operand(f"{name}/{tile}"), counter())
    high, wide = {"tensor": (70, 150), "row": (1, 150)}.get(tile) or map(int, tile.split("x"))
    for r in range(0, 70, high):
        for c in range(0, 150, wide):
            part, got = x[r : r + high, c : c + wide], found[r : r + high, c : c + wide]
            size = 1 << (part.numel() - 1).bit_length()
            padded = torch.nn.functional.pad(part.flatten(), (0, size - part.numel()))
            block = commq.get_format(name, block=min(max(size, 16), 4096))
            amax = padded.abs().amax()
            bound = error_bound(torch.tensor([[float(amax)] * 16]), commq.get_format(name, block=16)).amax()
            assert bool(((got - part).abs() <= bound).all()), (r, c, block)


def test_nothing_changes_in_zeros_and_a_nan_stays_in_its_tile():
    x = torch.randn(64, 64)
    x[:32, :32] = 0
    x[40, 50] = torch.nan
    for text in ("int8/32x32", "int4/32x32+all:stochastic", "int8/32x32+outliers"):
        found = quantized(x, operand(text), counter())
        assert not found[:32, :32].any() and bool(found[32:, 32:].isnan().all()) and not found[:, :32].isnan().any()


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("signs", ["", "random "])
def test_a_rotation_keeps_the_product(size, signs):
    """To the bit, for whole numbers; padded to whole runs."""
    a, b = torch.randint(-8, 9, (20, 100)).float(), torch.randint(-8, 9, (12, 100)).float()
    rotation = Rotation(size=size, signs=bool(signs))
    turned = [rotated(each, rotation, counter(5)) for each in (a, b)]
    assert torch.equal(turned[0] @ turned[1].T * gain(rotation), a @ b.T) and not torch.equal(turned[0][:, :100], a)
    found = emulated(a, b, gemm(f"fp8_e4m3/row {signs}hadamard {size}"), counters(5))
    assert cosine(found, a @ b.T) > 0.995


def test_a_second_term_divides_the_error():
    x = torch.randn(64, 128)
    one, two = (float((quantized(x, operand(text), counter()) - x).norm()) for text in ("int4/row", "int4/row+all"))
    assert two < one / 10  # 14 levels of a half-step each


def test_fallback_takes_tiles_with_outliers_and_no_others():
    x = torch.randn(512, 512)
    plain, fallback = operand("int8/128x128"), operand("int8/128x128+outliers")
    assert torch.equal(quantized(x, plain, counter()), quantized(x, fallback, counter()))
    x[5, [7, 200, 300]], x[300, [7, 200, 300]] = 1000.0, -3000.0  # as gated units make them: in 6 tiles of 16
    lost = [float((quantized(x, each, counter()) - x).square().mean().sqrt()) for each in (plain, fallback)]
    assert lost[1] < lost[0] / 50
    assert OUTLIER > 1


def exact(x, w, dy):
    return x @ w.T, dy @ w, dy.T @ x


def computed(x, w, dy, how, step=0):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    plan = Plan.of(how, (w.shape[0], w.shape[1]), None, name="layer", seed=0, rank=0)
    y = Product.apply(x, w, torch.tensor(step), plan, None)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


DRAWS = 120


def bias(name_or_precision, x, w, dy):
    """For dx and dw: bias along the exact gradient, and over all elements, in standard errors of the mean."""
    how = PRECISIONS[name_or_precision] if isinstance(name_or_precision, str) else name_or_precision
    runs = [computed(x, w, dy, how, step)[1:] for step in range(DRAWS)]
    found = []
    for draws, true in zip(zip(*runs, strict=True), exact(x, w, dy)[1:], strict=True):
        draws = torch.stack(draws).double()
        along = (draws * true).sum((1, 2)) / true.square().sum()
        spread = along.std().clamp_min(1e-12) / math.sqrt(DRAWS)
        z = (draws.mean(0) - true) / (draws.std(0).clamp_min(1e-12) / math.sqrt(DRAWS))
        found.append((float((along.mean() - 1) / spread), float(z.square().mean())))
    return found


@pytest.mark.parametrize("name", ["mxfp4", "int4"])
def test_gradients_are_unbiased(name):
    """G1: the mean over passes is within 3 standard errors of the exact gradient; elements scatter as they should."""
    x, w, dy = torch.randn(48, 64), torch.randn(40, 64), torch.randn(48, 40)
    limit = (DRAWS - 1) / (DRAWS - 3) * (1 + 3 * math.sqrt(2 / (40 * 48)) * 1.5)  # of the mean of t**2
    for along, scatter in bias(name, x, w, dy):
        assert abs(along) < 3 and scatter < limit


def test_nearest_rounding_is_biased():
    """The control: what G1 must refuse."""
    x, w, dy = torch.randn(48, 64), torch.randn(40, 64), torch.randn(48, 40)
    how = precision(dict.fromkeys(("input_gradient", "weight_gradient"), "mxfp4/1x32 random hadamard 32"))
    assert any(abs(along) > 3 or scatter > 1.5 for along, scatter in bias(how, x, w, dy))


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def gate(how, *, outliers):
    """The least cosine of y, dx and dw with the exact ones; outliers: some channels of x are 100 times larger."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((256, 256), (192, 256), (256, 192)))
    if outliers:
        x[:, 17] *= 300
        w[:, 17] *= 1e-3  # the product does not need them
    how = PRECISIONS[how] if isinstance(how, str) else precision(how)
    found, true = computed(x, w, dy, how), exact(x, w, dy)
    columns = torch.arange(256) != 17  # the weights of all other channels
    return min(cosine(found[0], true[0]), cosine(found[1], true[1]), cosine(found[2][:, columns], true[2][:, columns]))


GATES = {
    **dict.fromkeys(("fp8", "fp8-rowwise", "fp8-block", "int8", "int8-block", "int8-fallback", "mxfp8"), 0.995),
    **dict.fromkeys(("mxfp4", "nvfp4", "int4"), 0.97),
    "switchback": 0.995,
    "fp4-tpt": 0.97,
}


@pytest.mark.parametrize("name", GATES)
def test_gradients_point_the_right_way(name):
    assert gate(name, outliers=False) > GATES[name]


def test_naive_variants_point_elsewhere():
    """Controls: per-tensor int8 where a channel stands out, per-tensor int4 where none does."""
    naive = dict.fromkeys(("forward", "input_gradient", "weight_gradient"), "int8/tensor")
    assert gate(naive, outliers=True) < 0.9 < GATES["int8"] < gate(naive, outliers=False)
    naive = dict.fromkeys(("forward", "input_gradient", "weight_gradient"), "int4/tensor")
    assert gate(naive, outliers=False) < GATES["int4"]
