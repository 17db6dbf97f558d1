"""Encoded FSDP2: exact where it must be, inside the formats' bounds elsewhere, the same weights on all ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import commq
from commq.codecs.bounds import error_bound
from commq.collectives.memory import memory_of
from fsdp_cases import (
    Even,
    Net,
    Ones,
    batch,
    error,
    grid,
    line,
    loss,
    made,
    run,
    same_bits,
    same_on_all_ranks,
    shard,
    train,
)
from harness import process_ranks, thread_ranks
from numerics import paired

PLACES = {3: [None, (0, 1, 2)], 4: [(0, 0, 1, 1)], 8: [(0, 0, 1, 1, 2, 2, 3, 3), (0, 1, 1, 0, 2, 3, 3, 2)]}
"""On which hosts the ranks pretend to be."""
SHARDED = ("full-shard", "sdp4bit", "qsdp", "loco", "fp8", "int2", "ef-signsgd", "bf16")
DTYPES = torch.float32, torch.bfloat16, torch.float16


@thread_ranks(3, 4, 8)
def test_ones_stay_ones():
    """All ranks hold 1.0: gradients are exactly 1.0 on every path, hop, dtype and shape."""
    turns = [(world_size, hosts) for world_size, places in PLACES.items() for hosts in places]
    for hosts in PLACES[dist.get_world_size()]:
        cases = paired(SHARDED, DTYPES, turns.index((dist.get_world_size(), hosts)))
        if hosts and hosts[:2] == (0, 0):
            cases += [("zero++", dtype) for dtype in DTYPES]
        for recipe, dtype in cases:
            ones(shard(Ones(), recipe, mesh=line(hosts), mp_policy=MixedPrecisionPolicy(dtype, dtype)), dtype)


@thread_ranks(4)
def test_ones_stay_ones_between_hosts():
    for replicas in (2, 4):  # 4: NO_SHARD, one rank a shard
        for recipe in ("hybrid-shard", "full-shard", "int4", "int8", "bf16"):
            for dtype in DTYPES:
                policy = MixedPrecisionPolicy(dtype, dtype)
                ones(shard(Ones(), recipe, mesh=grid(replicas), mp_policy=policy), dtype)


def ones(model, dtype):
    for _ in range(2):
        model(torch.ones((), dtype=dtype)).backward()
        for parameter in model.parameters():
            assert bool((parameter.grad.to_local() == 1).all())
            parameter.grad = None


@thread_ranks(2, 3)
def test_gradients_stay_within_the_bound():
    """|error| of a mean <= the mean of the ranks' bounds, element by element, whatever the neighbours hold."""

    class Given(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(48, 128))
            self.bias = torch.nn.Parameter(torch.zeros(48))

        def forward(self, x):
            return (self.weight * x).sum() + (self.bias * x[:, 0]).sum()

    world_size = dist.get_world_size()
    inputs = [torch.randn(48, 128, generator=torch.Generator().manual_seed(rank)) for rank in range(world_size)]
    inputs[0][5] *= 1e4
    inputs[1][6] = 0
    for name in ("int8", "int4", "fp8"):
        model = shard(Given(), name, mesh=line())
        model(inputs[dist.get_rank()]).backward()
        exact = torch.stack(inputs).mean(dim=0)
        bounds = torch.stack([error_bound(x.flatten(), commq.recipe(name).format).view(x.shape) for x in inputs])
        found = model.weight.grad.full_tensor()
        assert bool(((found - exact).abs() <= bounds.mean(dim=0) + exact.abs() * 2.0**-20).all()), name
        assert error({"b": model.bias.grad.full_tensor()}, {"b": exact[:, 0]}) < 2.0**-8


def gathered(model):
    """The weights that the forward pass computes with, by name."""
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.unshard()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@thread_ranks(3, 4)
def test_weights_are_the_same_bits_on_all_ranks():
    hosts = (0, 0, 1, 1) if dist.get_world_size() == 4 else None
    for make in (Net, Even):
        for recipe in ("full-shard", "sdp4bit", "qsdp", commq.recipe("full-shard", weights="mxfp8")):
            found = run(recipe, make, mesh=line(hosts), steps=2)
            for name, weight in gathered(found.model).items():
                assert same_on_all_ranks(weight), name
                numel = found.parameters[name].numel()
                if found.parameters[name].ndim == 1 or numel < 2048:
                    assert torch.equal(weight, found.parameters[name]), name
                else:
                    assert 0 < error({name: weight}, {name: found.parameters[name]}) < 0.05, name


@thread_ranks(4)
def test_hops_and_prefetching_change_no_weight():
    """Gathers give the same bits flat and in two hops; results do not depend on when FSDP communicates."""
    flat, hops = (run("full-shard", mesh=line(hosts), steps=1) for hosts in (None, (0, 0, 1, 1)))
    there = gathered(sharded((0, 0, 1, 1)))
    for name, weight in gathered(sharded()).items():
        assert torch.equal(weight, there[name]), name
    assert not all(torch.equal(flat.grads[0][name], hops.grads[0][name]) for name in flat.grads[0])

    def prefetched(recipe):
        model = shard(made(), recipe, mesh=line((0, 0, 1, 1)))
        model.set_modules_to_forward_prefetch(list(model.blocks))
        return train(model)

    for recipe in ("full-shard", "sdp4bit", "loco"):
        same_bits(prefetched(recipe), run(recipe, mesh=line((0, 0, 1, 1))))


def sharded(hosts=None):
    return shard(made(), "full-shard", mesh=line(hosts))


@process_ranks(2)
def test_training_follows_plain_fsdp_and_counts_what_it_sends():
    plain = run(None)
    limits = {"full-shard": 0.25, "sdp4bit": 0.25, "qsdp": 0.05, "loco": 0.2, "int8": 0.02, "zero++": 0.25}
    for recipe, limit in limits.items():
        found = run(recipe)
        assert error(found.grads[0], plain.grads[0]) < limit, recipe
        same_bits(run(recipe), found)
        model = sharded()
        group = commq.handle_of(model).units[""].unit.layout.process_group
        before = memory_of(group).sent_bytes
        loss(model, 0).backward()
        stats = commq.handle_of(model).stats()
        assert stats.sent_bytes == memory_of(group).sent_bytes - before and 0 < stats.ratio < 0.5

    def of_two_steps(recipe):
        """Bytes of weights in the second and third step: the first gather of differences is plain."""
        first, third = (run(recipe, steps=n, reshard_after_forward=False).handle.stats() for n in (1, 3))
        return third.weight_bytes - first.weight_bytes

    assert of_two_steps("sdp4bit") < 0.8 * of_two_steps("full-shard")


@thread_ranks(2)
def test_asynchronous_gathers_and_accumulation():
    """With _set_unshard_async_op FSDP waits for the Work; the bits are those of the other way."""
    for recipe in ("full-shard", "sdp4bit"):
        model = shard(made(), recipe, mesh=line())
        model._set_unshard_async_op(True)
        same_bits(train(model), run(recipe, mesh=line()))
    for synced in (True, False):
        plain = run(None, mesh=line(), micro=2, synced=synced, steps=1)
        found = run("int8", mesh=line(), micro=2, synced=synced, steps=1)
        assert error(found.grads[0], plain.grads[0]) < 0.02
        assert found.handle.stats().steps == 1 + synced


@thread_ranks(2)
def test_a_nan_arrives():
    for recipe in ("full-shard", "loco", "sdp4bit"):
        model = shard(made(), recipe, mesh=line())
        x = batch(0)
        if dist.get_rank() == 1:
            x[0, 0] = torch.nan
        model(x).square().mean().backward()
        assert all(bool(p.grad.full_tensor().isnan().any()) for p in model.parameters())
        for each in commq.handle_of(model).units.values():
            norm = each.scatter.residual.norm()
            assert norm == norm and norm < torch.inf


@pytest.mark.parametrize("differences", [True, False])
@thread_ranks(2)
def test_four_bits_for_weights_need_differences(differences):
    """A control that fails: 4-bit weights without differences stay 50 times farther from the master."""
    recipe = commq.recipe(
        "sdp4bit", weights_difference=differences, format="fp32", inside="fp32", rotation=None, rounding="nearest"
    )
    model = shard(made(Even), recipe, mesh=line(), reshard_after_forward=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = train(model, 4, optimizer=optimizer)
    weights = gathered(found.model)
    distance = error(weights, found.parameters)
    assert distance < 1e-3 if differences else distance > 0.05


@thread_ranks(2)
def test_four_bits_for_weights_without_differences_learn_less():
    """A linear map is learned to the end with differences; without, the loss stays at the rounding of the weights."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64, 256))

        def forward(self, x):
            return x @ self.weight.T

    teacher = made(Linear).weight.detach() * 4
    losses = {}
    for differences in (True, False):
        recipe = commq.recipe("sdp4bit", weights_difference=differences)
        model = shard(made(Linear), recipe, mesh=line(), reshard_after_forward=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 200)
        for step in range(200):
            x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
            found = (model(x) - x @ teacher.T).square().mean()
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            schedule.step()
        losses[differences] = found.item()
    assert losses[True] < losses[False] / 1000, losses


@thread_ranks(2)
def test_formats_that_only_the_reference_has():
    exact = run(None, steps=1, mesh=line()).grads[0]
    weights, means = commq.recipe("qsdp", weights="dynamic8"), commq.recipe("int8", format="means")
    for recipe, limit in (("dynamic8", 0.02), (weights, 0.04), (means, 0.7)):
        found = run(recipe, steps=1, mesh=line())
        assert error(found.grads[0], exact) < limit
