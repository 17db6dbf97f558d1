"""Policies, the table, and what converting a model leaves as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import commq.lowp as lowp
from commq.lowp.gemm import gemm
from commq.lowp.operand import operand
from commq.train.config import ModelConfig
from commq.train.model import GPT


def gpt(layers=2):
    torch.manual_seed(0)
    return GPT(ModelConfig(layers=layers, dim=64, heads=2, context=32))


def tokens():
    return torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))


def gradients(model):
    model.zero_grad()
    model(tokens()).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", lowp.recipes())
def test_a_recipe_is_its_plain_data(name):
    policy = lowp.policy(name)
    assert lowp.policy(policy.plain()) == policy
    assert lowp.policy({"default": name}) == policy
    for gemm_of in policy.default.gemms:
        assert gemm_of is None or gemm(str(gemm_of)) == gemm_of


@pytest.mark.parametrize(
    "text",
    [
        "int8/row",
        "fp8_e5m2/tensor",
        "mxfp4/1x32:stochastic",
        "int8/128x128+outliers",
        "int4/1x32+all:stochastic",
        "bf16",
    ],
)
def test_an_operand_is_its_text(text):
    assert str(operand(text)) == text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("int9/row", "int9"),
        ("int8/rows", "tile"),
        ("int8/row:up", "rounding"),
        ("int8/row+more", "second"),
        ("bf16:stochastic", "bf16"),
        ("sign/1x32", "sign"),
        ("int8/1x-4", "tile"),
    ],
)
def test_an_operand_that_cannot_be_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        operand(text)


def test_refused_policies():
    with pytest.raises(ValueError, match=r"did you mean one of .*mlp"):
        lowp.convert(gpt(), {"default": "int8", "rules": {"blocks.0.mpl.*": "bf16"}})
    with pytest.raises(ValueError, match="int8"):
        lowp.policy("int-8")
    with pytest.raises(ValueError, match="defaults"):
        lowp.policy({"defaults": "int8"})
    with pytest.raises(ValueError, match="to convert"):
        lowp.convert(nn.GELU(), "int8")
    with pytest.raises(ValueError, match="seed=-1"):
        lowp.convert(gpt(), "int8", seed=-1)
    with pytest.raises(ValueError, match="backwards"):
        lowp.policy({"default": {"backwards": "int8/row"}})
    for wrong, match in (
        ({"keep": "head"}, "keep='head': expected a list"),
        ({"rules": ["ffn"]}, "expected a mapping of patterns"),
        ({"rules": {"ffn": 8}}, "precision 8: expected the name"),
        ({"default": {"forward": 8}}, "expected the name of a recipe, or texts"),
        ({"first": "1"}, "first='1': expected a whole number"),
        ({"last": 1.0}, "last=1.0: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            lowp.policy({"default": "int8"} | wrong)
    with pytest.raises(ValueError, match="first=1 and last=1 of 2 transformer blocks"):
        lowp.convert(gpt(2), {"default": "int8", "first": 1, "last": 1})
    with pytest.raises(ValueError, match="first=1 and last=0 of 0 transformer blocks"):
        lowp.convert(nn.Sequential(nn.Linear(8, 8)), {"default": "int8", "first": 1})


def test_rules_and_exemptions():
    policy = {"default": "int8", "rules": {"*.mlp.0": "bf16", "attention": {"forward": "int4/row"}}, "last": 1}
    conversion = lowp.convert(gpt(3), policy)
    chosen = {row.name: str(row.precision) for row in conversion.rows}
    int8, bf16 = (str(lowp.policy(name).default) for name in ("int8", "bf16"))
    for block in ("blocks.0", "blocks.1"):
        assert chosen[f"{block}.mlp.0"] == bf16 and chosen[f"{block}.mlp.2"] == int8
        assert chosen[f"{block}.attention.qkv"] == "int4/row | as it is | as it is"
    assert {chosen[name] for name in chosen if name.startswith(("blocks.2", "head"))} == {bf16}
    conversion.set_policy({"default": "int8", "keep": [], "min_features": 100})
    assert {row.name for row in conversion.rows if not row.precision.is_plain} == set()  # 64 features everywhere
    conversion.set_policy({"default": "int8", "keep": []})
    assert {str(row.precision) for row in conversion.rows} == {int8}


def test_attention_and_feed_forward_of_fp4_tpt():
    conversion = lowp.convert(gpt(), "fp4-tpt")
    formats = {row.name: str(row.precision.forward) for row in conversion.rows if row.name.startswith("blocks.0")}
    assert formats == {
        "blocks.0.attention.qkv": "fp8_e4m3/row",
        "blocks.0.attention.out": "fp8_e4m3/row",
        "blocks.0.mlp.0": "mxfp4/1x32",
        "blocks.0.mlp.2": "mxfp4/1x32",
    }
    conversion.set_policy({"default": "fp4-tpt", "rules": {"blocks.0.attention.out": "bf16"}})
    formats = {row.name: str(row.precision.forward) for row in conversion.rows}
    assert formats["blocks.0.attention.out"] == "None" and formats["blocks.0.attention.qkv"] == "fp8_e4m3/row"
    (start, first), (last, second) = lowp.phases("fp4-tpt")
    assert (start, first.name, second.name) == (0.0, "fp4-tpt", "bf16") and 0.9 <= last < 1


def test_the_table_names_every_layer():
    conversion = lowp.convert(gpt(), "nvfp4")
    lines = conversion.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(conversion.modules)
    assert "nvfp4/1x16 x nvfp4/16x16 (emulated)" in lines[1] and "192x64" in lines[1]
    assert lines[-1].split("  ")[0] == "head" and lines[-1].endswith("kept: head")


def test_conversion_keeps_names_parameters_and_hooks():
    model, calls = gpt(), []
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    layer = model.blocks[0].mlp[0]
    layer.register_forward_hook(lambda *_: calls.append(1))
    lowp.convert(model, "int8")
    assert model.blocks[0].mlp[0] is layer and isinstance(layer, nn.Linear)
    assert {name: id(p) for name, p in model.named_parameters()} == before and list(model.state_dict()) == keys
    gradients(model)
    assert calls
    assert same(gradients(copy.deepcopy(model)), gradients(model))


def test_as_it_is_gives_the_same_bits():
    plain = gradients(gpt())
    model = gpt()
    conversion = lowp.convert(model, "bf16")
    assert same(gradients(model), plain)
    conversion.set_policy("int4")
    assert not same(gradients(model), plain)
    conversion.set_policy("bf16")
    assert same(gradients(model), plain)


def test_bits_are_a_function_of_seed_step_and_layer():
    model = gpt()
    conversion = lowp.convert(model, "mxfp4", seed=3)
    conversion.step(7)
    first = gradients(model)
    conversion.step(2**40 + 8)
    assert not same(gradients(model), first)
    conversion.step(7)
    assert same(gradients(model), first)
    other = gpt()
    lowp.convert(other, "mxfp4", seed=4).step(7)
    assert not same(gradients(other), first)


def test_a_backward_pass_has_the_number_of_its_forward_pass():
    model = gpt()
    conversion = lowp.convert(model, "mxfp4")
    conversion.step(1)
    expected = gradients(model)
    model.zero_grad()
    loss = model(tokens()).float().square().mean()
    conversion.step(2)
    loss.backward()
    assert same({name: p.grad for name, p in model.named_parameters()}, expected)


def test_checkpointing_repeats_the_same_bits():
    text = "int8/row:stochastic"
    policy = {"default": dict.fromkeys(("forward", "input_gradient", "weight_gradient"), text)}
    found = []
    for repeats in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16))
        conversion = lowp.convert(model, policy)
        conversion.watch()
        for number in (1, 2):
            conversion.step(number)
            x = torch.randn(5, 48, requires_grad=True)
            y = checkpoint(model, x, use_reentrant=False) if repeats else model(x)
            y.square().sum().backward()
            found.append([y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
        found.append(conversion.statistics())
    (first, second, measured), (again, other, repeated) = found[:3], found[3:]
    assert all(torch.equal(a, b) for a, b in zip(first + second, again + other, strict=True))
    assert measured == repeated and len(measured) == 12


def test_autocast_computes_what_a_bf16_input_would():
    layer, x = nn.Linear(48, 32), torch.randn(5, 48)
    lowp.convert(layer, "int8")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    z = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, z)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(48,), (0, 48), (1, 48), (3, 5, 48)])
@pytest.mark.parametrize("name", ["fp8", "int8-fallback", "nvfp4", "int4"])
def test_shapes(name, shape):
    layer, x = nn.Linear(48, 20), torch.randn(shape, requires_grad=True)
    lowp.convert(layer, {"default": name, "keep": []})
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == (20, 48)


def test_statistics():
    layer = nn.Linear(64, 32)
    conversion = lowp.convert(layer, {"default": {"forward": "int8/tensor"}, "keep": []})
    x = torch.randn(16, 64)
    assert not conversion.statistics()
    conversion.watch()
    x[0, :8] = 1e-9  # with a largest number of 1 or more, these become 0
    x[1, 0] = torch.inf
    x[1, 0] = 3.0
    for _ in range(2):  # sums over passes
        layer(x).sum().backward()
    first, second = conversion.statistics()
    assert (first.gemm, first.operand, second.operand) == ("forward", "input", "weight")
    q = conversion_values(x, "int8/tensor")
    expected = 10 * torch.log10(x.square().sum() / (q - x).square().sum())
    assert abs(first.sqnr - float(expected)) < 1e-3  # dB: float32 sums
    assert first.underflow == float(((q == 0) & (x != 0)).float().mean()) >= 8 / x.numel()
    assert first.overflow == 0.0 and not conversion.statistics()
    x[1, 0] = torch.inf
    layer(x).sum().backward()
    assert conversion.statistics()[0].overflow == 1.0  # one scale: all of it is NaN
    conversion.watch(False)
    layer(x).sum().backward()
    assert not conversion.statistics()


def test_the_share_of_fallback_tiles_is_reported():
    layer = nn.Linear(512, 32)
    conversion = lowp.convert(layer, {"default": {"forward": "int8/128x128+outliers x int8/128x128"}})
    conversion.watch()
    x = torch.randn(256, 512)
    x[5, 7] = 1000.0
    layer(x).sum().backward()
    assert [each.fallback for each in conversion.statistics()] == [1 / 8, 0.0]


def conversion_values(x, text):
    from commq.lowp.quantize import Counter, quantized

    return quantized(x, operand(text), Counter(0, 0, torch.tensor(0)))
