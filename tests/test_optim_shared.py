"""Ranks of one process that share parameters and an optimizer, as bench/convergence.py drives them."""

import threading

import pytest
import torch
import torch.distributed as dist

from commq.collectives.transport import C10d
from commq.optim import Birder, OneBitAdam, OneBitLamb, SignSGD
from commq.optim.exchange import FlatBucket
from harness import run_threads
from optim_cases import Weights, gradient, parameters_of, set_gradients

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
