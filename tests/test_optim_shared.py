"""Ranks of one process that share parameters and an optimizer, as bench/convergence.py drives them."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commq.collectives.transport import C10d
from commq.optim import Birder, EFSignSGD, OneBitAdam, OneBitLamb, OneBitSGD, SignSGD, ZeroOneAdam
from commq.optim.exchange import FlatBucket
from harness import run_threads, thread_ranks
from optim_cases import Weights, gradient, parameters_of, same_on_all_ranks, set_gradients

WORLD_SIZE, STEPS = 3, 9
KINDS = [(OneBitAdam, {"freeze_step": 4}), (OneBitLamb, {"freeze_step": 4}), (Birder, {}), (SignSGD, {})]


def alone(kind, options):
    """The parameters of a rank that has its own, after some steps."""
    module = Weights()
    optimizer = kind(module, group=dist.group.WORLD, **options)
    for step in range(STEPS):
        set_gradients(module, step)
        optimizer.step()
    return parameters_of(module)


def together(kind, options, module, optimizer, barrier):
    """The same where one module and optimizer serve all ranks."""
    rank, parameters = dist.get_rank(), list(module.parameters())
    exchange, bucket = optimizer.make_exchange(C10d()), FlatBucket(parameters)
    for step in range(STEPS):
        for (name, _), view in zip(module.named_parameters(), bucket.views, strict=True):
            view.copy_(gradient(name, step, rank))
        exchange.exchange(bucket)
        barrier.wait()
        if rank == 0:
            for p, view in zip(parameters, bucket.views, strict=True):
                p.grad = view
            optimizer.step()
        barrier.wait()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_ranks_that_share_an_optimizer_get_the_bits_of_those_that_do_not(kind, options):
    expected = run_threads(alone, WORLD_SIZE, args=(kind, options))
    module = Weights()
    optimizer, barrier = kind(module, **options), threading.Barrier(WORLD_SIZE)
    run_threads(together, WORLD_SIZE, args=(kind, options, module, optimizer, barrier))
    assert all(torch.equal(parameters_of(module), each) for each in expected)


@thread_ranks(2)
@pytest.mark.parametrize(
    ("kind", "options"),
    [*KINDS, (ZeroOneAdam, {"var_freeze_step": 4}), (EFSignSGD, {}), (OneBitSGD, {"adagrad": True, "momentum": 0.9})],
)
def test_parameters_without_elements_or_without_a_gradient(kind, options):
    module = Weights()
    module.empty, module.unused = nn.Parameter(torch.empty(0, 8)), nn.Parameter(torch.ones(60, 60))
    optimizer = kind(module, weight_decay=0.0, group=dist.group.WORLD, **options)
    for step in range(STEPS):
        for name, p in module.named_parameters():
            p.grad = torch.zeros_like(p) if name in ("empty", "unused") else gradient(name, step, dist.get_rank())
        optimizer.step()
    assert bool((module.unused == 1.0).all())
    assert parameters_of(module).isfinite().all() and same_on_all_ranks(parameters_of(module))
