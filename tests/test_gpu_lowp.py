"""Real low-precision GEMMs on a GPU against the emulated ones; one compiled graph holds both."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import commq.lowp as lowp
from commq.codecs.rotation import Rotation
from commq.lowp import codes as plain
from commq.lowp import real
from commq.lowp.codes import Codes
from commq.lowp.gemm import gemm
from commq.lowp.operand import operand
from commq.lowp.quantize import Counter
from commq.lowp.random import random_bits
from commq.lowp.recipes import PRECISIONS
from commq.lowp.values import values
from lowp_cases import (
    INT8_PRODUCTS,
    OPERANDS,
    PAIRS,
    RARE,
    REAL,
    counter,
    hard_input,
    largest_products,
    odd_input,
    products,
)

pytestmark = pytest.mark.gpu


def capability():
    return torch.cuda.get_device_capability()


def on_gpu(counter):
    return Counter(counter.seed, counter.stream, counter.step.cuda())


def moved(codes: Codes) -> Codes:
    second = codes.second and tuple(each.cuda() for each in codes.second)
    return Codes(codes.codes.cuda(), codes.steps.cuda(), second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("along", "across"), PAIRS)
def test_codes_have_the_bits_of_the_specification(along, across, dtype):
    x = hard_input(along or across).to(dtype).contiguous()
    both = [operand(text) if text else None for text in (along, across)]
    counters = counter(5), counter(6)
    found = real.encode(x.cuda(), *both, tuple(on_gpu(each) for each in counters))
    for got, how, view, count in zip(found, both, (x, x.T), counters, strict=True):
        if how is not None:
            want = plain.encoded(view, how, count)
            assert torch.equal(got.steps.cpu().nan_to_num(7), want.steps.nan_to_num(7))
            assert torch.equal(got.codes.cpu().view(torch.int8), want.codes.view(torch.int8))


def test_random_bits_are_those_of_the_cpu():
    clock = torch.tensor(2**33 + 9)
    assert torch.equal(random_bits(clock.cuda(), 5000, 3, 7).cpu(), random_bits(clock, 5000, 3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("text", "rotation"), [*OPERANDS, *RARE])
def test_emulation_is_that_of_the_cpu(text, rotation, turned, dtype):
    x, how = odd_input(text).to(dtype), operand(text)
    found, want = (
        values(each.T if turned else each, how, place(counter(5)), rotation, place(counter(7)))
        for each, place in ((x.cuda(), on_gpu), (x, lambda count: count))
    )
    if how.second == "outliers":  # a geometric mean, whose sum has another order
        return torch.testing.assert_close(found.cpu(), want, equal_nan=True)
    assert torch.equal(found.cpu().isnan(), want.isnan()) and not bool(want.isnan().all())
    assert torch.equal(found.cpu().nan_to_num(7).view(torch.int32), want.nan_to_num(7).view(torch.int32))


@pytest.mark.parametrize("text", ["mxfp4/1x32:stochastic", "nvfp4/1x16:stochastic", "nvfp4/16x16"])
def test_a_captured_graph_draws_anew(text):
    """It reads the step where it stands, and finds the scale of scales again."""
    how, x = operand(text), torch.randn(96, 160, device="cuda")
    clock = torch.zeros((), dtype=torch.int64, device="cuda")
    count, signs, rotation = Counter(1, 2, clock), Counter(1, 3, clock), Rotation(size=16, signs=True)
    values(x, how, count, rotation, signs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = values(x, how, count, rotation, signs)
    for step in (1, 2):
        clock.fill_(step)
        x.mul_(1 / 3)
        graph.replay()
        assert torch.equal(found, values(x, how, count, rotation, signs)), step
        assert torch.equal(found.cpu(), values(x.cpu(), how, *cpu(count, signs, rotation)))


def cpu(count, signs, rotation):
    count, signs = (Counter(each.seed, each.stream, each.step.cpu()) for each in (count, signs))
    return count, rotation, signs


def test_few_kernels_an_operand():
    """Two where all tiles share a number, and what sets that to zero; else one."""
    x, clock = torch.randn(256, 256, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    count, signs, rotation = Counter(1, 2, clock), Counter(1, 3, clock), Rotation(size=16, signs=True)
    for text, most in (("mxfp4/1x32:stochastic", 1), ("int4/1x32+all:stochastic", 1), ("nvfp4/16x16", 3)):
        run = partial(values, x, operand(text), count, rotation, signs)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            run()
        names = [event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        if not names:
            pytest.skip("the profiler sees no kernels here")
        assert len(names) <= most, names


@pytest.mark.parametrize(("text", "shape"), INT8_PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products(text, shape, dtype):
    how, (R, S, C) = gemm(text), shape
    a, b = torch.randn(R, C), torch.randn(S, C)
    a[3, 5], b[100, 20] = 500.0, 1000.0
    first, second = plain.encoded(a, how.first, counter()), plain.encoded(b, how.second, counter())
    want = plain.multiplied(first, second, how)
    found = real.multiply(moved(first), moved(second), how, dtype).float().cpu()
    rounding = 2.0**-20 if dtype == torch.float32 else 2.0**-8
    assert float((found - want).abs().max()) <= rounding * float(want.abs().max())


def test_configurations_of_the_int8_kernel():
    """The same bits: sums are whole numbers."""
    kernels = pytest.importorskip("commq.lowp.triton_int8")
    a, b = (torch.randint(-127, 128, (rows, 1104), dtype=torch.int8, device="cuda") for rows in (4000, 2512))
    steps = torch.rand(4000, 1, device="cuda"), torch.rand(2512, 1, device="cuda")
    want = (a.double() @ b.double().T).float() * steps[0] * steps[1].T
    for config in kernels.CONFIGS:
        if config.descriptors and capability() < (9, 0):
            continue
        out = torch.empty(4000, 2512, device="cuda", dtype=torch.bfloat16)
        kernels.multiply_rows(a, b, *steps, out, config)
        assert torch.equal(out, want.bfloat16()), config


@pytest.mark.parametrize("recipe", REAL)
@pytest.mark.parametrize("tokens", [1024, 200])
def test_real_products_obey_their_bound(recipe, tokens):
    """|real - emulated| <= 2**-8 |y| + 2**-10 sum |a b| + 2**-8 max |a b|, with the same codes (see real.py)."""
    if capability() != (9, 0) and recipe.startswith("fp8"):
        pytest.skip("needs a Hopper GPU")
    x, w, dy = (torch.randn(shape, device="cuda").bfloat16() for shape in ((tokens, 512), (768, 512), (tokens, 768)))
    x[5] *= 100
    plan, found = products(recipe, capability(), x, w, dy)
    assert plan.real == tuple(how is not None for how in PRECISIONS[recipe].gemms)
    _, emulated = products(recipe, None, x.float(), w.float(), dy.float())
    x, w, dy = x.float().abs(), w.float().abs(), dy.float().abs()
    for i, (got, want, (a, b)) in enumerate(zip(found, emulated, ((x, w), (dy, w.T), (dy.T, x.T)), strict=True)):
        if tokens % 128 and i and recipe in ("int8-block", "int8-fallback"):
            continue  # padded with other random bits
        summed = 2.0**-16 * (a @ b.T)
        if recipe.startswith("fp8"):
            summed = 2.0**-10 * (a @ b.T) + 2.0**-8 * largest_products(a, b)
        bound = 2.0**-8 * want.abs() + 1.1 * summed  # 1.1: the codes' magnitudes are not quite x's
        assert got.dtype == torch.bfloat16 and bool(((got.float() - want).abs() <= bound).all()), ["y", "dx", "dw"][i]


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("recipe", [*REAL, "mxfp4", "nvfp4", "int4"])
def test_compiled_in_one_graph(recipe):
    """The same as eager but for the rounding of what is between the layers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Gated(256).cuda().bfloat16()
    conversion = lowp.convert(model, {"default": recipe, "keep": [], "min_features": 0})
    conversion.step(3)
    x = torch.randn(256, 256, device="cuda").bfloat16().requires_grad_()
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        y = run(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))))
    least = 0.995 if recipe in REAL else 0.97
    for a, b in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) > least
    if recipe in REAL and capability() == (9, 0):
        assert "(real)" in conversion.table() and "(emulated)" not in conversion.table()


def test_a_layer_that_moves_to_the_gpu_uses_it():
    model = nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))
    conversion = lowp.convert(model, {"default": "int8", "min_features": 0})
    assert "(real)" not in conversion.table()
    model.cuda()
    conversion.step(1)
    assert "(emulated)" not in conversion.table()
    model(torch.randn(64, 256, device="cuda").bfloat16()).sum().backward()
    assert bool(model[0].weight.grad.isfinite().all())
