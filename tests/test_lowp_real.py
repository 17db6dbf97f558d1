"""The path of real GEMMs, in plain torch and in interpreted Triton, gives the emulated numbers."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import commq.lowp as lowp
from commq.codecs.philox import random_u16
from commq.lowp import codes as plain
from commq.lowp import real
from commq.lowp.codes import is_real
from commq.lowp.gemm import gemm
from commq.lowp.operand import operand
from commq.lowp.product import Plan, Product
from commq.lowp.quantize import quantized
from commq.lowp.random import random_bits
from commq.lowp.recipes import PRECISIONS
from interpreted import interpreting
from lowp_cases import INT8_PRODUCTS, PAIRS, REAL, counter, hard_input, products

HOPPER = (9, 0)


@pytest.mark.parametrize("recipe", REAL)
@pytest.mark.parametrize("tokens", [256, 200])
def test_real_and_emulated_products_are_the_same(recipe, tokens):
    """But for the last bits of sums; tokens that are no multiple of 128 are padded (other random bits: rounded to
    nearest only)."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((tokens, 256), (384, 256), (tokens, 384)))
    x[5] *= 100
    (_, emulated), (plan, found) = (products(recipe, capability, x, w, dy) for capability in (None, HOPPER))
    assert plan.real == (True, True, recipe != "switchback")
    for i, (a, b) in enumerate(zip(found, emulated, strict=True)):
        if tokens % 128 and i and recipe in ("int8-block", "int8-fallback"):
            continue
        assert float((a - b).abs().max() / b.abs().max()) < 1e-6


@pytest.mark.parametrize(("capability", "nbytes"), [(HOPPER, 256 * 128 + 4), (None, 256 * 128 * 4)])
def test_a_real_weight_gradient_saves_codes_instead_of_activations(capability, nbytes):
    saved = []
    x, w = torch.randn(256, 128), torch.randn(384, 128, requires_grad=True)
    plan = Plan.of(PRECISIONS["fp8"], (384, 128), capability, name="layer", seed=1, rank=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Product.apply(x, w, torch.tensor(7), plan, None)
    assert sum(t.numel() * t.element_size() for t in saved if t is not w) == nbytes + 8  # and the step


def test_what_is_real():
    tokens, wide = 0, 4096
    shape = tokens, wide, wide
    assert is_real(gemm("fp8_e4m3/tensor"), shape, (8, 9)) and not is_real(gemm("fp8_e4m3/tensor"), shape, (8, 0))
    assert not is_real(gemm("fp8_e5m2/tensor"), shape, HOPPER)  # no such GEMM
    assert is_real(gemm("int8/row"), shape, (8, 0)) and not is_real(gemm("int8/row"), shape, None)
    assert not is_real(gemm("int8/row"), (tokens, wide, 4100), HOPPER)
    assert not is_real(gemm("fp8_e4m3/1x128 x fp8_e4m3/128x128"), (tokens, wide, 4096 + 64), HOPPER)
    assert not is_real(gemm("fp8_e4m3/1x128 x fp8_e4m3/128x128"), shape, (10, 0))
    for text in ("mxfp8", "mxfp4", "nvfp4", "int4", "int8/row hadamard 32", "bf16", "int8/row+all", "fp8_e4m3/32x32"):
        assert not is_real(gemm(text), shape, HOPPER), text


@pytest.mark.parametrize("text", ["fp8_e4m3/tensor", "int8/row", "fp8_e4m3/1x128", "fp8_e5m2/128x128", "int8/32x32"])
def test_codes_stand_for_what_is_emulated(text):
    x, how = torch.randn(256, 384), operand(text)
    found = plain.encoded(x, how, counter())
    values = found.codes.float() * plain._spread(found.steps, found.codes, how.tile)
    emulated = quantized(x, how, counter())
    assert bool(((values - emulated).abs() <= emulated.abs() * 2.0**-22).all())  # two products instead of one


@pytest.mark.parametrize("text", ["fp8_e4m3/1x128 x fp8_e4m3/128x128", "fp8_e4m3/1x128", "fp8_e4m3/row"])
@pytest.mark.parametrize("shape", [(256, 384, 640), (16384, 4096, 4096), (4096, 12288, 16384)])
def test_scaled_mm_takes_these_scales(text, shape):
    """On the meta device: its own checks of shapes and strides, the padding to four tiles among them."""
    R, S, C = shape
    how = gemm(text)
    a, b = torch.empty(R, C, device="meta"), torch.empty(S, C, device="meta")
    (a, a_steps), (b, b_steps) = real._outputs(a, how.first), real._outputs(b, how.second)
    assert real._fp8(a, b, a_steps, b_steps, how, torch.bfloat16).shape == (R, S)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    with interpreting():
        yield


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("along", "across"), PAIRS)
def test_encoding_both_ways_in_triton(interpreted, along, across, dtype):
    x = hard_input(along or across).to(dtype).contiguous()
    both = [operand(text) if text else None for text in (along, across)]
    counters = counter(5), counter(6)
    found = real.encode(x, *both, counters)
    for got, how, view, count in zip(found, both, (x, x.T), counters, strict=True):
        if how is None:
            assert got is None
            continue
        want = plain.encoded(view, how, count)
        assert torch.equal(got.steps.nan_to_num(7), want.steps.nan_to_num(7))
        got, want = (each.codes.view(torch.int8).to(torch.int32) for each in (got, want))
        if how.format.name == "int8":
            assert torch.equal(got, want)
            continue
        # The interpreter's cast to fp8 rounds ties up, subnormals down, and loses the carry into a power of two; that
        # of a GPU does not (test_gpu_lowp.py).
        mantissa = 7 if how.format.name == "fp8_e4m3" else 3
        assert bool((((got - want).abs() <= 1) | ((want & mantissa) == 0)).all())


@pytest.mark.parametrize("count", [1, 2048, 5000])
def test_random_bits_in_triton(interpreted, count):
    clock = torch.tensor(2**33 + 9)
    runs = torch.arange(-(-count // 16))
    want = random_u16(runs, 16, seed=3, step=2**33 + 9, stream=7).view(-1)[:count]
    assert torch.equal(random_bits(clock, count, 3, 7).long(), want)


@pytest.mark.parametrize(("text", "shape"), INT8_PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_in_triton(interpreted, text, shape, dtype):
    how, (R, S, C) = gemm(text), shape
    a, b = torch.randn(R, C), torch.randn(S, C)
    a[3, 5], b[100, 20] = 500.0, 1000.0
    first, second = plain.encoded(a, how.first, counter()), plain.encoded(b, how.second, counter())
    want = plain.multiplied(first, second, how)
    found = real.multiply(first, second, how, dtype).float()
    rounding = 2.0**-20 if dtype == torch.float32 else 2.0**-7  # the interpreter cuts bfloat16 off
    assert float((found - want).abs().max()) <= rounding * float(want.abs().max())


@pytest.mark.parametrize("descriptors", [False, True])
def test_configurations_of_the_int8_kernel(interpreted, descriptors):
    """The same bits: sums are whole numbers. 320 x 176 pieces, more than there are programs; the contraction is no
    multiple of a piece's."""
    kernels = importlib.import_module("commq.lowp.triton_int8")
    a, b = (torch.randint(-127, 128, (rows, 80), dtype=torch.int8) for rows in (320, 176))
    steps, out = (torch.rand(320, 1), torch.rand(176, 1)), torch.empty(320, 176)
    config = kernels.Config(rows=64, columns=64, contraction=64, descriptors=descriptors)
    kernels.multiply_rows(a, b, *steps, out, config)
    assert torch.equal(out, (a.float() @ b.float().T) * steps[0] * steps[1].T)


@pytest.mark.parametrize(("recipe", "autocast"), [("fp8", False), ("int8", True)])
def test_one_graph_holds_all_of_it(recipe, autocast):
    """As they are on a GPU, and emulated."""
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    first, second = lowp.convert(model, recipe).modules.values()
    size = first.out_features, first.in_features
    first.plan = Plan.of(first.precision, size, HOPPER, name=first.name, seed=0, rank=0)
    x = torch.randn(2, 128, 128, requires_grad=True)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
            loss = y.float().square().sum()
        found.append((y, *torch.autograd.grad(loss, (x, first.weight, second.weight, second.bias))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_compiled_model_follows_its_policy():
    """Formats of other widths, block scales and tiles come and go in one place: each has a graph, the same bits.

    What quantizes is an operator in it: traces stay short, and a compiler would take keys that are symbols for floats.
    """
    runs, called = [], set()

    def backend(graph, _):
        called.update(
            str(node.target) for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes
        )
        return graph.forward

    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        conversion = lowp.convert(model, "fp8")
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        found = []
        for number, recipe in enumerate(("fp8", "mxfp4", "fp8")):
            conversion.set_policy(recipe)
            conversion.step(number)
            y = run(torch.randn(24, 32))
            found += [y, *torch.autograd.grad(y.square().sum(), model.parameters())]
        runs.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert any("lowp_quantize" in name for name in called) and not any("xor" in name for name in called), called


def test_a_copied_plan_is_that_plan():
    layer = nn.Linear(48, 32)
    lowp.convert(layer, "mxfp4")
    again = pickle.loads(pickle.dumps(layer.plan))
    assert again == layer.plan and again.precision == PRECISIONS["mxfp4"]
    x = torch.randn(3, 48)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
