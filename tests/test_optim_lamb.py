"""OneBitLamb against its equations, within rounding, and its replicas, states and rows without a gradient."""

import copy

import pytest
import torch
import torch.distributed as dist

import commq
from commq.optim import OneBitLamb
from harness import thread_ranks
from optim_cases import (
    DEAD_ROWS,
    SHAPES,
    Exchange,
    Weights,
    gradient,
    parameters_of,
    same_on_all_ranks,
    set_gradients,
)

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-6, 1e-2, 0.1
FREEZE = 6


def make(dtype=torch.float32, weight_decay=DECAY, **options):
    module = Weights(dtype)
    optimizer = OneBitLamb(module, LR, BETAS, EPS, weight_decay, freeze_step=FREEZE, group=dist.group.WORLD, **options)
    return module, optimizer


def run(module, optimizer, steps):
    for step in steps:
        set_gradients(module, step)
        optimizer.step()


def norm(x):
    return torch.linalg.vector_norm(x)


@thread_ranks(3, 5)
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_both_phases_follow_the_equations(decay):
    world_size = dist.get_world_size()
    recipe = commq.Recipe(
        name="all",
        format=commq.get_format("sign"),
        feedback=commq.Feedback(rule="classic"),
        answer_feedback=commq.Feedback(rule="classic"),
        exempt=commq.Exempt(one_dimensional=False, min_numel=0),
    )
    module, optimizer = make(weight_decay=decay, momentum_format=recipe)
    name = "matrix"
    x = module.matrix.detach().clone()
    m, v, coeff, factor = torch.zeros(SHAPES[name]), torch.zeros(SHAPES[name]), torch.zeros(()), torch.ones(())
    exchange = Exchange(world_size, x.numel())
    factors = set()
    for step in range(FREEZE + 12):
        run(module, optimizer, [step])
        grads = [gradient(name, step, w) for w in range(world_size)]
        if step < FREEZE:
            g = sum(grads[1:], grads[0]) / world_size
            m, v = m.lerp(g, 1 - BETAS[0]), torch.addcmul(v * BETAS[1], g, g, value=1 - BETAS[1])
            direction = m / (v.sqrt() + EPS) + decay * x
            c = (norm(x) / norm(direction)).clamp(0.01, 10.0)
            coeff = coeff.lerp(c, 1 - 0.9)
            x = x - LR * (direction * c)
            if step == FREEZE - 1:
                coeff = coeff / (1 - 0.9**FREEZE)
                inverse = (v.sqrt() + EPS).reciprocal()
            continue
        before = m
        m = exchange.average([torch.lerp(g, m, BETAS[0]) for g in grads])
        spoken_of = (m - BETAS[0] * before) / (1 - BETAS[0])
        v = torch.addcmul(v * BETAS[1], spoken_of, spoken_of, value=1 - BETAS[1])
        adam = m * inverse
        direction = adam + decay * x
        share = (norm(adam) / norm(direction)).clamp(max=1.0)
        f = (1 / ((v.sqrt() + EPS) * inverse)).max()
        f = (f * share + (1 - share)).clamp(0.5, 4.0)
        factor = f.clamp(factor * 0.9, factor * 1.1)
        factors.add(float(factor))
        x = x - LR * (direction * (coeff * factor))
        # Sums of products are fused in one and not in the other: a few roundings of the largest weight a step.
        bound = (step + 1) * 2.0**-22 * float(x.abs().max())
        assert float((module.matrix.detach() - x).abs().max()) <= bound, step
        x = module.matrix.detach().clone()
    assert len(factors) > 1, "the trust ratio was never scaled"


@thread_ranks(3)
@pytest.mark.parametrize("stop", [4, FREEZE, 11], ids=["warm-up", "at the switch", "frozen"])
def test_a_loaded_state_goes_on_to_the_bit(stop):
    module, optimizer = make()
    run(module, optimizer, range(stop))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(module, optimizer, range(stop, 16))
    again, other = make()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    run(again, other, range(stop, 16))
    assert torch.equal(parameters_of(module), parameters_of(again))


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_gradient_do_not_move(dtype):
    module, optimizer = make(dtype, weight_decay=0.0)
    before = module.table.detach().clone()
    run(module, optimizer, range(50))
    assert torch.equal(module.table[DEAD_ROWS], before[DEAD_ROWS])
    assert not torch.equal(module.table, before)
    assert same_on_all_ranks(parameters_of(module))


def test_arguments_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="on both sides of 1"):
        OneBitLamb(Weights(), factor_max=0.9)
