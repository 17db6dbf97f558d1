"""ZeroOneAdam: its schedules, its equations, bytes, and replicas that are the same whenever they meet."""

import copy

import pytest
import torch
import torch.distributed as dist

import commq
from commq.optim import ZeroOneAdam
from commq.optim.phase import LocalSteps, VarianceRefreshes
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

BETAS, EPS, LR = (0.9, 0.95), 1e-8, 1e-2
SCHEDULE = {"var_freeze_step": 6, "var_update_scaler": 2, "local_step_scaler": 8, "local_step_clipper": 4}


def make(dtype=torch.float32, **options):
    module = Weights(dtype)
    return module, ZeroOneAdam(module, LR, BETAS, EPS, group=dist.group.WORLD, **(SCHEDULE | options))


def run(module, optimizer, steps):
    for step in steps:
        set_gradients(module, step)
        optimizer.step()


def test_variance_refreshes_double_their_interval():
    refreshes = VarianceRefreshes(doubling=3, end=40)
    at = [step for step in range(100) if refreshes.at(step)]
    assert at == [0, 1, 2, 3, 5, 7, 9, 13, 17, 21, 29, 37]
    assert [refreshes.count(step) for step in range(100)] == [sum(s <= step for s in at) for step in range(100)]


def test_meetings_double_their_interval_up_to_the_longest():
    meetings = LocalSteps(begin=5, doubling=6, longest=4)
    at = [step for step in range(5, 40) if meetings.at(step)]
    assert at == [5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 36]
    assert all(meetings.at(step) for step in range(5))
    # where the interval does not divide the steps between doublings, ranks also meet before it changes
    assert [step for step in range(20) if LocalSteps(begin=0, doubling=3, longest=8).at(step)] == [0, 1, 2, 4, 5, 8, 16]


@thread_ranks(3, 5)
def test_every_phase_follows_the_equations_to_the_bit():
    world_size = dist.get_world_size()
    recipe = commq.Recipe(
        name="all",
        format=commq.get_format("sign"),
        feedback=commq.Feedback(rule="classic"),
        answer_feedback=commq.Feedback(rule="classic"),
        exempt=commq.Exempt(one_dimensional=False, min_numel=0),
    )
    module, optimizer = make(momentum_format=recipe)
    name, rank = "matrix", dist.get_rank()
    x = module.matrix.detach().clone()
    m, v, factor = (torch.zeros(SHAPES[name]) for _ in range(3))
    common, refreshes, met = Exchange(world_size, x.numel()), 0, 0
    for step in range(30):
        run(module, optimizer, [step])
        grads = [gradient(name, step, w) for w in range(world_size)]
        if step in (0, 1, 2, 4):
            g = sum(grads[1:], grads[0]) / world_size
            m, v = m.lerp(g, 1 - BETAS[0]), torch.addcmul(v * BETAS[1], g, g, value=1 - BETAS[1])
            refreshes += 1
            factor = ((v / (1 - BETAS[1] ** refreshes)).sqrt() + EPS).reciprocal()
            x = torch.addcmul(x, m, factor, value=-LR)
        elif step < 6:
            m = common.average([torch.lerp(g, m, BETAS[0]) for g in grads])
            x = torch.addcmul(x, m, factor, value=-LR)
        else:
            if step == 6:
                common = Exchange(world_size, x.numel())
                last, lr_sum = x.clone(), 0.0
                m_w, x_w = [m] * world_size, [x] * world_size
                u_w = [torch.zeros(SHAPES[name])] * world_size
            lr_sum += LR
            if optimizer.meetings.at(step):
                met += 1
                sums = [torch.lerp(g, m, BETAS[0]) * LR + u for g, m, u in zip(grads, m_w, u_w, strict=True)]
                mean = common.average(sums)
                last = torch.addcmul(last, mean, factor, value=-1.0)
                m_w, x_w = [mean / lr_sum] * world_size, [last] * world_size
                u_w, lr_sum = [torch.zeros(SHAPES[name])] * world_size, 0.0
                assert optimizer.synchronized and same_on_all_ranks(parameters_of(module))
            else:
                m_w = [m.lerp(g, 1 - BETAS[0]) for g, m in zip(grads, m_w, strict=True)]
                u_w = [torch.add(u, m, alpha=LR) for u, m in zip(u_w, m_w, strict=True)]
                x_w = [torch.addcmul(x, m, factor, value=-LR) for x, m in zip(x_w, m_w, strict=True)]
                assert not optimizer.synchronized and not same_on_all_ranks(parameters_of(module))
            x = x_w[rank]
        assert torch.equal(module.matrix.detach(), x), step
    assert met == 14


@thread_ranks(3)
@pytest.mark.parametrize("stop", [1, 5, 6, 16, 27], ids=["variance", "one bit", "at the switch", "local", "late"])
def test_a_loaded_state_goes_on_to_the_bit(stop):
    module, optimizer = make(weight_decay=0.1, decoupled_weight_decay=True)
    run(module, optimizer, range(stop))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(module, optimizer, range(stop, 33))
    again, other = make(weight_decay=0.1, decoupled_weight_decay=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert stop < 6 or other.synchronized == LocalSteps(begin=6, doubling=8, longest=4).at(stop - 1)
    run(again, other, range(stop, 33))
    assert torch.equal(parameters_of(module), parameters_of(again))


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_gradient_do_not_move(dtype):
    module, optimizer = make(dtype)
    before = module.table.detach().clone()
    for step in range(80):
        run(module, optimizer, [step])
        assert not optimizer.synchronized or same_on_all_ranks(parameters_of(module))
    assert torch.equal(module.table[DEAD_ROWS], before[DEAD_ROWS])
    assert not torch.equal(module.table, before)


@thread_ranks(2)
def test_local_steps_send_nothing_and_all_together_a_125th_of_fp32():
    module = torch.nn.Linear(512, 256)
    optimizer = ZeroOneAdam(
        module, var_freeze_step=2, local_step_scaler=4, local_step_clipper=16, group=dist.group.WORLD
    )
    stats = [optimizer.exchange.stats()]
    for step in range(2 + 16 + 48):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        stats.append(optimizer.exchange.stats())
    for step in range(2, 66):
        sent = stats[step + 1].sent_bytes - stats[step].sent_bytes
        assert (sent == 0) == (not optimizer.meetings.at(step))
        assert stats[step + 1].raw_bytes - stats[step].raw_bytes == stats[1].raw_bytes
    frozen = stats[-1].sent_bytes - stats[2].sent_bytes, stats[-1].raw_bytes - stats[2].raw_bytes
    assert frozen[0] / frozen[1] <= 0.008


@thread_ranks(3)
def test_a_nan_in_a_local_step_is_on_all_ranks_when_they_meet():
    module, optimizer = make()
    step = 0
    while step < 16 or optimizer.meetings.at(step):
        run(module, optimizer, [step])
        step += 1
    set_gradients(module, step)
    if dist.get_rank() == 1:
        module.matrix.grad[3, 4] = float("nan")
    optimizer.step()
    step += 1
    while not optimizer.meetings.at(step):
        run(module, optimizer, [step])
        step += 1
    run(module, optimizer, [step])
    assert module.matrix.isnan().any()
    poisoned = module.matrix.isnan()
    assert same_on_all_ranks(poisoned)


def test_a_grad_scaler_is_refused():
    with pytest.raises(ValueError, match="drift apart"):
        ZeroOneAdam(Weights(), var_freeze_step=3, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="expected at least 1"):
        ZeroOneAdam(Weights(), var_freeze_step=3, local_step_scaler=0)
