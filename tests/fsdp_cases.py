"""Sharded models for tests: the same model and data with torch's fully_shard and with commq's."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import commq
from commq.collectives.hosts import HOSTS, Hosts
from commq.collectives.memory import memory_of

RAW = commq.Recipe(name="raw", format=commq.get_format("fp32"))


class Net(nn.Module):
    """Odd shapes: no dimension is a multiple of the world size or of a block; biases are exempt."""

    def __init__(self, width=66, blocks=2):
        super().__init__()
        self.first = nn.Linear(37, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 65)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Even(Net):
    """Every shard starts and ends at whole units: rows are encoded as they stand."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(2))
        self.first, self.head = nn.Linear(37, 256), nn.Linear(256, 65)


class Ones(nn.Module):
    """Its gradients are 1, whatever the ranks hold."""

    SHAPES = ((130, 70), (7,), (3, 41, 17), (256, 128), (1, 5000), (2048,))

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(shape) for shape in self.SHAPES)

    def forward(self, x):
        return sum(part.sum() for part in self.parts) * x


def made(make=Net):
    """The same parameters every time: ranks that are threads share torch's generator, so it is not asked."""
    model, generator = make(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        bound = parameter.shape[-1] ** -0.5
        parameter.data = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
    return model


def shard(model, recipe, *, blocks=True, **kwargs):
    """recipe None: torch's fully_shard."""
    parts = [*model.blocks, model] if blocks and hasattr(model, "blocks") else [model]
    for part in parts:
        if recipe is None:
            fully_shard(part, **kwargs)
        else:
            commq.fully_shard(part, recipe=recipe, **kwargs)
    return model


def line(hosts=None):
    """A mesh of all ranks, which pretend to be on `hosts` (the host of each rank; None: on one)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    memory_of(mesh.get_group()).facts[HOSTS] = Hosts(tuple(hosts or [0] * dist.get_world_size()))
    return mesh


def grid(replicas):
    return init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicate", "shard"))


def batch(step, rank=None):
    seed = 1000 * step + (dist.get_rank() if rank is None else rank)
    return torch.randn(16, 37, generator=torch.Generator().manual_seed(seed))


def loss(model, step):
    return model(batch(step)).float().square().mean()


def whole(tensor):
    return tensor.full_tensor().detach().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


@dataclass
class Run:
    grads: list
    parameters: dict
    model: Any
    optimizer: Any

    @property
    def handle(self):
        return commq.handle_of(self.model)


def train(model, steps=3, *, first=0, optimizer=None, micro=1, synced=False, clip=None):
    """Steps of AdamW. micro: micro-batches a step, reduced each if `synced`, else only the last."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    grads = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for i in range(micro):
            model.set_requires_gradient_sync(synced or i == micro - 1)
            (loss(model, step * micro + i) / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        named = model.named_parameters()
        grads.append({name: None if p.grad is None else whole(p.grad) for name, p in named})
        optimizer.step()
    return Run(grads, {name: whole(p) for name, p in model.named_parameters()}, model, optimizer)


def run(recipe, make=Net, *, build=None, **options):
    """A model of the same initial parameters on all ranks, sharded and trained."""
    sharding = {key: options.pop(key) for key in list(options) if key not in ("steps", "micro", "synced", "clip")}
    model = made(make)
    if build is not None:
        build(model)
    return train(shard(model, recipe, **sharding), **options)


def same_bits(a, b):
    for left, right in zip([*a.grads, a.parameters], [*b.grads, b.parameters], strict=True):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            if tensor is None or right[name] is None:
                assert tensor is None and right[name] is None, name
            else:
                assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def error(found, exact):
    """Relative, in the 2-norm, of all tensors of two dicts together."""
    names = [name for name, tensor in exact.items() if tensor is not None]
    a, b = (torch.cat([each[name].float().flatten() for name in names]) for each in (found, exact))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def same_on_all_ranks(tensor, group=None):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor, group=group)
    return all(torch.equal(row, rows[0]) for row in rows)
