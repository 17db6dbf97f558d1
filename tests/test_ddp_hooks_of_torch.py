"""The cases that PyTorch tests its own communication hooks with, put to ours.

They are those of PyTorch's test_ddp_hooks.py, of the hook tests in test_c10d_common.py, test_c10d_gloo.py and
test_c10d_nccl.py, and of the parity tests in distributed_test.py: the same model and the same inputs with and without
a hook. Gradients may differ by what the formats of the recipe lose, as computed in recipe_bounds.py.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import commq
from against_plain import same_on_all_ranks, vector
from harness import process_ranks
from recipe_bounds import mean_bound

RECIPES = ("int8", "int4", "onebit")
NOTHING_EXEMPT = commq.Exempt(one_dimensional=False, min_numel=0)


class Scaled(nn.Module):
    """A parameter times the input: its gradient is the input, which PyTorch makes another power of on every rank."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(40, 20))

    def forward(self, x):
        return self.p * x ** (1 + dist.get_rank())


class Branches(nn.Module):
    """Two outputs of parameters of their own; a third layer that rank 1 alone uses, a fourth that none does."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(20, 50) for _ in range(4))

    def forward(self, x, uses_third):
        y = self.first(x)
        return y + self.third(x) if uses_third else y, self.second(x)


class Two(Branches):
    """No parameter is left out."""

    def __init__(self):
        super().__init__()
        del self.third, self.fourth


class Shared(nn.Module):
    """One weight in two layers, and a layer that is computed again in backward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(checkpoint(self.middle, self.first(x), use_reentrant=False)))


class Images(nn.Module):
    """Weights of which DDP keeps the strides."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 9, 3)).to(
            memory_format=torch.channels_last
        )

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def batch(number, device, *shape):
    """Another one on every rank."""
    generator = torch.Generator().manual_seed(2020 + 10 * number + dist.get_rank())
    return torch.randn(shape or (40, 20), generator=generator).to(device)


def synced(model):
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def scaled(model, device):
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(2020)).to(device)
    model(x).mean().backward()


def once(model, device):
    model(batch(0, device)).square().mean().backward()


def accumulated(model, device):
    """Two passes that are not exchanged, and one that is."""
    for number in range(3):
        with synced(model) if number < 2 else nullcontext():
            model(batch(number, device)).square().mean().backward()


def several_passes(model, device):
    """Two forward passes before one backward pass."""
    (model(batch(0, device)).square().mean() + model(batch(1, device)).square().mean()).backward()


def two_backward_passes(model, device):
    """Of one forward pass: the buckets of one exchange come in both."""
    for output in model(batch(0, device), False):
        output.square().mean().backward()


def unused(model, device):
    y, z = model(batch(0, device), dist.get_rank() == 1)
    (y.square().mean() + z.square().mean()).backward()


def never_used(model, device):
    y, z = model(batch(0, device), False)
    (y.square().mean() + z.square().mean()).backward()


def images(model, device):
    model(batch(0, device, 8, 3, 12, 12)).square().mean().backward()


@dataclass
class Case:
    model: Any
    step: Any
    options: dict = field(default_factory=dict)


def net():
    return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 5))


SMALL = {"bucket_cap_mb": 0.001}
"""Each layer is a bucket or two."""
CASES = {
    "scaled": Case(Scaled, scaled),
    "a net": Case(net, once),
    "small buckets": Case(net, once, SMALL),
    "static graph": Case(net, once, {**SMALL, "static_graph": True}),
    "accumulated": Case(net, accumulated, SMALL),
    "accumulated into views": Case(net, accumulated, {**SMALL, "gradient_as_bucket_view": True}),
    "several passes": Case(net, several_passes, SMALL),
    "two backward passes": Case(Two, two_backward_passes, SMALL),
    "unused on a rank": Case(Branches, unused, {**SMALL, "find_unused_parameters": True}),
    "unused, views": Case(Branches, unused, {**SMALL, "find_unused_parameters": True, "gradient_as_bucket_view": True}),
    "never used": Case(Branches, never_used, {**SMALL, "static_graph": True}),
    "shared weights": Case(Shared, once, {**SMALL, "static_graph": True}),
    "channels last": Case(Images, images),
}


def model_of(case, device):
    torch.manual_seed(0)
    return case.model().to(device)


def grads_of(case, device, recipe=None, steps=2):
    """Of steps on the same inputs, the first in DDP's first buckets, the next in those it then rebuilds; the handle."""
    ddp = DistributedDataParallel(model_of(case, device), **case.options)
    handle = commq.register(ddp, recipe) if recipe else None
    grads = []
    for _ in range(steps):
        ddp.zero_grad()
        case.step(ddp, device)
        grads.append({name: None if p.grad is None else p.grad.clone() for name, p in ddp.module.named_parameters()})
    return grads, handle


def check(name, recipe, device, steps=2):
    """Gradients with the hook are those without it, within the bound; replicas have the same bits."""
    case = CASES[name]
    alone = model_of(case, device)
    case.step(alone, device)
    plain, _ = grads_of(case, device, None, steps)
    found, handle = grads_of(case, device, recipe, steps)
    for step in range(steps):
        assert same_on_all_ranks(vector(found[step].values()).to(device)), name
        there = [[grad for grad in grads[step].values() if grad is not None] for grads in (found, plain)]
        assert not all(map(torch.equal, *there)), name  # it was our hook
    for key, p in alone.named_parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        rows = [torch.empty_like(in_memory_order(own)) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, in_memory_order(own))
        bound = mean_bound(handle.recipe, key, tuple(p.shape), torch.stack(rows).cpu())[: own.numel()]
        for grad, exact in ((found[step][key], plain[step][key]) for step in range(steps)):
            assert (grad is None) == (exact is None), (name, key)
            if exact is not None:
                assert grad.stride() == exact.stride(), (name, key)
                off = in_memory_order(grad - exact).double().cpu()
                assert bool((off.abs() <= bound).all()), (name, key)


def in_memory_order(grad):
    """As DDP lays it out in its bucket."""
    return (grad if grad.is_contiguous() else grad.permute(0, 2, 3, 1)).flatten()


def check_all(recipe, device):
    check("small buckets", commq.recipe(recipe), device, steps=1)
    # Without a residual, which is none of the first step's bound.
    chosen = commq.recipe(recipe, exempt=NOTHING_EXEMPT, feedback=commq.Feedback(rule="none"))
    for name in CASES:
        check(name, chosen, device)


@process_ranks(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_close_to_those_without_a_hook(recipe):
    check_all(recipe, "cpu")


@process_ranks(2, backend="cpu:gloo,cuda:nccl", share_gpu=True, timeout=240.0)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_close_to_those_without_a_hook_on_a_gpu(recipe):
    check_all(recipe, "cuda")


# What DDP and other hooks do with ours


def futures(device):
    """A hook made of ours and what comes after it; which bucket is the last."""
    flags = []

    def hook(state, bucket):
        flags.append(bucket.is_last())
        return commq.comm_hook(state, bucket).then(lambda future: 10 * future.value())

    case = CASES["small buckets"]
    ddp = DistributedDataParallel(model_of(case, device), **case.options)
    ddp.register_comm_hook(commq.HookState("int4", ddp), hook)
    found, _ = grads_of(case, device, "int4")
    for grads in found:
        flags.clear()
        ddp.zero_grad()
        once(ddp, device)
        assert flags == [False] * (len(flags) - 1) + [True]
        for name, p in ddp.module.named_parameters():
            assert torch.equal(p.grad, 10 * grads[name]), name
    assert len(flags) == 2


@process_ranks(2)
def test_futures_pass_through():
    futures("cpu")


@process_ranks(2, backend="cpu:gloo,cuda:nccl", share_gpu=True, timeout=240.0)
def test_futures_pass_through_on_a_gpu():
    futures("cuda")


@process_ranks(2)
def test_registering():
    """DDP takes our hook by its signature, shows it by its name, and refuses a second one and what is none."""
    ddp = DistributedDataParallel(net())
    with pytest.raises(TypeError, match="must be callable"):
        ddp.register_comm_hook(commq.HookState("int4", ddp), 1)
    commq.register(ddp, "int4")
    with pytest.raises(RuntimeError, match="only be called once"):
        commq.register(ddp, "int4")
    once(ddp, "cpu")
    assert ddp._get_ddp_logging_data()["comm_hook"] == "comm_hook"


@process_ranks(2)
def test_parity_over_many_steps():
    """PyTorch's parity test: a linear layer under SGD; fp32 has the bits of no hook in every step."""

    def train(recipe):
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Linear(20, 70, bias=False), gradient_as_bucket_view=True)
        if recipe:
            commq.register(ddp, recipe)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for number in range(50):
            optimizer.zero_grad()
            (ddp(batch(number, "cpu")) - 1).square().mean().backward()
            optimizer.step()
        return ddp.module.weight.detach()

    plain = train(None)
    assert torch.equal(train("fp32"), plain)
    for recipe in RECIPES:
        assert same_on_all_ranks(train(commq.recipe(recipe, exempt=NOTHING_EXEMPT)))
