"""Every recipe under DDP and under commq.fully_shard, on two processes: the same weights, to the bit."""

import functools

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commq
import commq.lowp as lowp
from commq.lowp.recipes import PRECISIONS
from fsdp_cases import RAW, Net, loss, made, same_on_all_ranks, shard, whole
from harness import process_ranks

STEPS = 2


def trained(recipe, wrap, *, optimizer=torch.optim.AdamW, between=None):
    """Parameters after two steps of a model that was converted, then wrapped."""
    model = made(Net)
    conversion = lowp.convert(model, recipe, seed=5)
    wrapped = wrap(model)
    optimizer = optimizer(wrapped.parameters(), lr=1e-2)
    for step in range(STEPS):
        conversion.step(step)
        loss(wrapped, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if between is not None:
            between(conversion)
    return {name.removeprefix("module."): whole(p) for name, p in wrapped.named_parameters()}


ddp = functools.partial(DistributedDataParallel, gradient_as_bucket_view=True)
fsdp = functools.partial(shard, recipe=RAW)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@process_ranks(2)
def test_recipes_under_ddp_and_fsdp():
    seen = {}
    for recipe, precision in PRECISIONS.items():
        policy = {"default": precision.plain()}
        seen[recipe] = trained(policy, ddp)
        assert same(trained(policy, fsdp), seen[recipe]), recipe
        assert all(same_on_all_ranks(p) for p in seen[recipe].values()), recipe
        assert all(bool(p.isfinite().all()) for p in seen[recipe].values()), recipe
    names = list(seen)
    assert not any(same(seen[a], seen[b]) for i, a in enumerate(names) for b in names[:i])


@process_ranks(2)
def test_switching_and_watching_between_steps():
    def switch(conversion):
        conversion.set_policy("int8")
        conversion.watch()

    def watched(conversion):
        conversion.watch()

    switched = trained("mxfp4", ddp, between=switch)
    assert same(trained("mxfp4", fsdp, between=switch), switched)
    assert not same(trained("mxfp4", ddp), switched)
    assert same(trained("mxfp4", ddp, between=watched), trained("mxfp4", ddp))


@process_ranks(2)
def test_random_bits_and_what_is_sent():
    """Ranks draw different bits; low precision in the GEMMs goes with encoded communication."""
    layer = nn.Linear(64, 64)
    nn.init.ones_(layer.weight)
    lowp.convert(layer, {"default": {"forward": "int4/row:stochastic x bf16"}})
    x = torch.linspace(0, 1, 64).expand(8, 64)
    assert not same_on_all_ranks(layer(x).detach())
    compressed = functools.partial(shard, recipe=commq.recipe("int8"), blocks=False)
    exact, found = trained("int8", fsdp), trained("int8", compressed)
    assert not same(found, exact) and all(bool(p.isfinite().all()) for p in found.values())
