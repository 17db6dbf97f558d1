"""Birder, EFSignSGD, SignSGD and OneBitSGD against their equations."""

import copy

import pytest
import torch
import torch.distributed as dist

import commq
from commq.optim import Birder, EFSignSGD, OneBitSGD, SignSGD
from harness import thread_ranks
from optim_cases import Exchange, Weights, gradient, parameters_of, same_on_all_ranks, set_gradients

LR = 1e-2
NO_EXEMPTION = commq.Exempt(one_dimensional=False, min_numel=0)
CLASSIC = commq.Feedback(rule="classic")


def recipe(fmt="sign", feedback=CLASSIC, **options):
    fmt = commq.get_format(fmt)
    return commq.Recipe(
        name="all", format=fmt, feedback=feedback, answer_feedback=feedback, exempt=NO_EXEMPTION, **options
    )


def run(module, optimizer, steps):
    for step in steps:
        set_gradients(module, step)
        optimizer.step()


def gradients(step):
    return [gradient("matrix", step, rank) for rank in range(dist.get_world_size())]


@thread_ranks(3, 5)
def test_ef_signsgd_follows_its_equations_to_the_bit():
    module = Weights()
    optimizer = EFSignSGD(module, LR, 0.9, 0.1, momentum_format=recipe(), group=dist.group.WORLD)
    x, m = module.matrix.detach().clone(), torch.zeros(module.matrix.shape)
    exchange = Exchange(dist.get_world_size(), x.numel())
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1)
        run(module, optimizer, [step])
        m = m * 0.9 + exchange.average([torch.add(g, x, alpha=0.1) * (LR / (step + 1)) for g in gradients(step)])
        x = x - m
        assert torch.equal(module.matrix.detach(), x), step


@thread_ranks(3)
@pytest.mark.parametrize("adagrad", [False, True])
def test_one_bit_sgd_follows_its_equations_to_the_bit(adagrad):
    module = Weights()
    optimizer = OneBitSGD(
        module, LR, 0.9, adagrad=adagrad, warmup_steps=2, momentum_format=recipe(), group=dist.group.WORLD
    )
    x, m, total = module.matrix.detach().clone(), torch.zeros(module.matrix.shape), torch.zeros(module.matrix.shape)
    exchange = Exchange(dist.get_world_size(), x.numel())
    for step in range(8):
        run(module, optimizer, [step])
        grads = gradients(step)
        g = sum(grads[1:], grads[0]) / 3 if step < 2 else exchange.average(grads)
        if adagrad:
            total = torch.addcmul(total, g, g)
            g = g / (total.sqrt() + 1e-10)
        m = m * 0.9 + g
        x = torch.add(x, m, alpha=-LR)
        assert torch.equal(module.matrix.detach(), x), step


@thread_ranks(3, 4, 5)
def test_the_majority_decides():
    module = Weights()
    optimizer = SignSGD(module, LR, 0.5, 0.1, group=dist.group.WORLD)
    x = module.matrix.detach().clone()
    m_w = [torch.zeros(x.shape)] * dist.get_world_size()
    for step in range(6):
        run(module, optimizer, [step])
        m_w = [m.lerp(g, 0.5) for m, g in zip(m_w, gradients(step), strict=True)]
        votes = torch.stack([m.sign() for m in m_w]).sum(dim=0)
        outcome = torch.where(votes >= 0, 1.0, -1.0)
        x = torch.add(x * (1 - LR * 0.1), outcome, alpha=-LR)
        assert torch.equal(module.matrix.detach(), x), step
        assert same_on_all_ranks(parameters_of(module))


@thread_ranks(3)
def test_birders_signs_have_the_expectation_of_its_rule():
    """With a learning rate of 1 and nothing but one constant gradient a rank, the mean step is the mean of u."""
    steps = 150
    module, exact = Weights(), Weights()
    signs = Birder(module, 1.0, 0.9, momentum_format=recipe(feedback=commq.Feedback(), rounding="stochastic"),
                   group=dist.group.WORLD)  # fmt: skip
    plain = Birder(exact, 1.0, 0.9, momentum_format="fp32", group=dist.group.WORLD)
    before = module.matrix.detach().clone()
    for step in range(steps):
        run(module, signs, [step % 7])
        run(exact, plain, [step % 7])
    assert same_on_all_ranks(parameters_of(module))
    expected, found = ((each.matrix.detach() - before) / steps for each in (exact, module))
    # The answer is one of two values at most 1 apart from 0, so its variance is at most 1, and so is a rank's sign's
    # over the number of ranks; steps are independent. Five deviations for each of 3315 elements.
    deviation = (4 / 3 / steps) ** 0.5
    assert float((found - expected).abs().max()) < 5 * deviation
    assert float((found - expected).square().mean().sqrt()) > deviation / 10  # it is random
    assert expected.abs().max() <= 1.0 and expected.abs().mean() > 0.05


@thread_ranks(2)
@pytest.mark.parametrize("kind", [Birder, EFSignSGD, OneBitSGD, SignSGD])
def test_a_loaded_state_goes_on_to_the_bit_and_whole_rows_of_zeros_stay(kind):
    def make():
        module = torch.nn.Embedding(20, 128)
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 1, 2560).view(20, 128))
        return module, kind(module, group=dist.group.WORLD)

    def train(module, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(97 * step + dist.get_rank())
            module.weight.grad = torch.randn(20, 128, generator=generator)
            module.weight.grad[7:11] = 0.0
            optimizer.step()

    module, optimizer = make()
    before = module.weight.detach().clone()
    train(module, optimizer, range(5))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, range(5, 11))
    again, other = make()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, other, range(5, 11))
    assert torch.equal(module.weight, again.weight)
    assert torch.equal(module.weight[7:11], before[7:11])
    assert (module.weight != before)[:7].any(dim=1).all()
    assert optimizer.exchange.stats().ratio < 0.04
    assert same_on_all_ranks(module.weight.detach())


@thread_ranks(3)
@pytest.mark.parametrize("kind", [Birder, EFSignSGD, OneBitSGD, SignSGD])
def test_a_nan_of_one_rank_arrives_on_all(kind):
    module = Weights()
    optimizer = kind(module, group=dist.group.WORLD)
    run(module, optimizer, range(2))
    set_gradients(module, 2)
    if dist.get_rank() == 1:
        module.matrix.grad[3, 4] = float("nan")
    optimizer.step()
    assert module.matrix.isnan().any() and same_on_all_ranks(module.matrix.isnan())
    residuals = optimizer.exchange.state_dict()["residual"]["values"]
    assert all(values.isfinite().all() for values in residuals.values())


def test_arguments_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="momentum in"):
        EFSignSGD(Weights(), momentum=1.0)
    with pytest.raises(ValueError, match="warmup_steps"):
        OneBitSGD(Weights(), warmup_steps=-1)
