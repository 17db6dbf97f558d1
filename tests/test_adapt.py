"""Levels that follow the gradients, through DistributedDataParallel."""

import pytest
import torch

import commq
from harness import process_ranks
from test_ddp import backward, grads, make, same_on_all_ranks


@process_ranks(2)
@pytest.mark.parametrize("name", ["alq3", "amq3"])
def test_levels_follow_the_gradients_on_all_ranks(name):
    """After step 1 they change, everywhere to the same bits; a resumed run has them and goes on as the other does."""
    recipe = commq.recipe(name, adapt={"method": name[:3], "first": (1,), "every": 0})
    ddp, handle = make(recipe)
    for step in range(2):
        assert handle.adaptation.format.levels == recipe.format.levels
        backward(ddp, step)
    assert handle.adaptation.format.levels != recipe.format.levels and handle.adaptation.format.levels[-1] == 1.0
    assert same_on_all_ranks(torch.tensor(handle.adaptation.format.levels, dtype=torch.float64))
    resumed, other = make(recipe)
    other.load_state_dict(handle.state_dict())
    assert other.adaptation.format.levels == handle.adaptation.format.levels
    for step in range(2, 4):
        backward(ddp, step)
        backward(resumed, step)
        assert same_on_all_ranks(grads(ddp)) and torch.equal(grads(ddp), grads(resumed))


@process_ranks(2)
def test_fixed_levels_stay():
    ddp, handle = make(commq.recipe("alq3", adapt=None))
    for step in range(3):
        backward(ddp, step)
    assert handle.adaptation.format.levels == commq.get_format("alq3").levels


@process_ranks(2)
def test_widths_follow_the_gradients_on_all_ranks():
    """mu so small that 4 bits are needed, then so large that 1 bit will do; a resumed run has the same."""
    for mu, expected in ((1e-6, "eden4"), (1e6, "eden1")):
        recipe = commq.recipe("double-quantization", adapt={"mu": mu, "every": 2})
        ddp, handle = make(recipe)
        assert handle.adaptation.format.name == "eden2"
        backward(ddp, 0)
        assert handle.adaptation.format == commq.get_format(expected)
        resumed, other = make(recipe)
        other.load_state_dict(handle.state_dict())
        for step in range(1, 3):
            backward(ddp, step)
            backward(resumed, step)
            assert same_on_all_ranks(grads(ddp)) and torch.equal(grads(ddp), grads(resumed))
