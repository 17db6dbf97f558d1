"""DDP with commq against plain DDP: the same model and the same data, with and without the hook.

With two ranks recipe fp32 gives plain DDP's bits. DDP halves, then adds; commq adds in fp32, then halves: halving is
exact, so both round the sum of two numbers once (16-bit gradients too: their sum is rounded to 16 bits once).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commq

LIMITS = {"int8": 0.02, "int4": 0.25}
"""Relative 2-norm error of both hops, of Gaussian-like gradients (as in test_ddp.py)."""


class Net(nn.Module):
    """No parameter is a whole number of blocks; `scale` and the biases are exempt."""

    def __init__(self, width=66):
        super().__init__()
        self.first = nn.Linear(37, width)
        self.second = nn.Linear(width, 65)
        self.scale = nn.Parameter(torch.ones(65))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.scale


class Mixed(nn.Module):
    """bf16 in the middle of fp32: DDP makes buckets of one dtype."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(37, 66)
        self.second = nn.Linear(66, 65, dtype=torch.bfloat16)
        self.third = nn.Linear(65, 40)

    def forward(self, x):
        return self.third(self.second(torch.relu(self.first(x)).bfloat16()).float())


def batch(step, *shape, dtype=torch.float32):
    """Another one on every rank and in every step."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(shape or (16, 37), generator=generator).to(dtype)


def loss(model, step):
    return model(batch(step)).square().mean()


def backward(model, step):
    loss(model, step).backward()


def attach(model, recipe):
    """A handle for each DDP module in `model`, which may have recipes of their own; none without a recipe."""
    ddps = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    recipes = recipe if isinstance(recipe, tuple) else [recipe] * len(ddps)
    return [commq.register(ddp, each) for ddp, each in zip(ddps, recipes, strict=True)] if recipe else []


def same_on_all_ranks(tensor, group=None):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor, group=group)
    return all(torch.equal(row, tensor) for row in rows)


def vector(tensors):
    """One float32 vector of tensors of any dtype (exact for 16 bits)."""
    return torch.cat([torch.zeros(0), *(t.detach().float().flatten() for t in tensors if t is not None)])


def grads_of(parameters):
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()}


def error(found, exact):
    """Relative, in the 2-norm."""
    return float((found - exact).float().norm() / exact.float().norm().clamp_min(1e-30))


@dataclass
class Run:
    grads: list
    """Of each step: by name, None where there is none."""
    parameters: dict
    """After the last step."""
    handles: list


def run(build, step, recipe, steps=3):
    """A few steps of AdamW. `build()` makes the model, DDP modules in it; `step(model, number)` makes its gradients."""
    torch.manual_seed(0)
    model = build()
    parameters = dict(model.named_parameters())
    handles = attach(model, recipe)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, eps=1e-3)  # float16 has no 1e-8
    grads = []
    for number in range(steps):
        optimizer.zero_grad()
        step(model, number)
        grads.append(grads_of(parameters))
        optimizer.step()
    return Run(grads, {name: p.detach().clone() for name, p in parameters.items()}, handles)


def same_bits(a, b):
    """Of two runs, in every step: which gradients there are, their dtypes, strides and bits, then the parameters."""
    for left, right in zip([*a.grads, a.parameters], [*b.grads, b.parameters], strict=True):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            if tensor is None or right[name] is None:
                assert tensor is None and right[name] is None, name
                continue
            assert (tensor.dtype, tensor.stride()) == (right[name].dtype, right[name].stride()), name
            assert torch.equal(tensor, right[name]), (name, error(tensor, right[name]))


def close(found, exact, limit):
    """Gradients of one step, parameter by parameter."""
    assert found.keys() == exact.keys()
    for name, grad in exact.items():
        if grad is None or found[name] is None:
            assert grad is None and found[name] is None, name
            continue
        assert (found[name].dtype, found[name].stride()) == (grad.dtype, grad.stride()), name
        assert error(found[name], grad) < limit, name


def check(build, step=backward, *, steps=3, recipes=("int8", "int4"), group=None, exact=True):
    """A mode of DDP on two ranks. `group` is DDP's; not exact: only the formats are checked, fp32 elsewhere."""
    plain = run(build, step, None, steps)
    assert any(grad is not None and bool(grad.any()) for grad in plain.grads[-1].values())
    if exact:
        same_bits(run(build, step, "fp32", steps), plain)
    for recipe in recipes:
        found = run(build, step, recipe, steps)
        close(found.grads[0], plain.grads[0], LIMITS[recipe])
        for part in (*found.grads, found.parameters):
            assert same_on_all_ranks(vector(part.values()), group)
        same_bits(run(build, step, recipe, steps), found)
        for handle in found.handles:
            stats = handle.stats()
            assert stats.steps == steps and 0 < stats.sent_bytes < 0.5 * stats.raw_bytes
