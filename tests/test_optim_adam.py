"""OneBitAdam: warm-up against torch's Adam, then against its equations, in every phase and on any number of ranks."""

import copy

import pytest
import torch
import torch.distributed as dist

import commq
from commq.collectives.transport import C10d
from commq.optim import OneBitAdam
from commq.optim.exchange import FlatBucket
from harness import thread_ranks
from optim_cases import DEAD_ROWS, SHAPES, Exchange, Weights, gradient, parameters_of, same_on_all_ranks, set_gradients

BETAS, EPS, LR = (0.9, 0.95), 1e-8, 1e-2


def make(freeze_step=5, dtype=torch.float32, **options):
    module = Weights(dtype)
    return module, OneBitAdam(module, LR, BETAS, EPS, freeze_step=freeze_step, group=dist.group.WORLD, **options)


def run(module, optimizer, steps):
    for step in steps:
        set_gradients(module, step)
        optimizer.step()


@thread_ranks(1)
@pytest.mark.parametrize("decoupled", [False, True])
def test_warm_up_is_torchs_adam_to_the_bit(decoupled):
    module, optimizer = make(freeze_step=100, weight_decay=0.1, decoupled_weight_decay=decoupled)
    plain = Weights()
    reference = torch.optim.Adam(
        plain.parameters(), LR, BETAS, EPS, weight_decay=0.1, decoupled_weight_decay=decoupled, fused=True
    )
    for each, opt in ((module, optimizer), (plain, reference)):
        run(each, opt, range(7))
    assert torch.equal(parameters_of(module), parameters_of(plain))


def factor_rounding(steps):
    """Relative, of 1 / (sqrt(v) + eps) in fp32: half an eps for each operation, of which the root leaves half.

    v: 4 in each step and 2 in its correction; then the root's own, adding eps, and inverting.
    """
    return ((4 * steps + 2) / 2 + 3) * torch.finfo(torch.float32).eps / 2


@thread_ranks(3, 5)
@pytest.mark.parametrize("fmt", ["sign", "int4"])
def test_every_phase_follows_the_equations_to_the_bit(fmt):
    world_size = dist.get_world_size()
    exempt = commq.Exempt(one_dimensional=False, min_numel=0)
    recipe = commq.Recipe(
        name="all",
        format=commq.get_format(fmt),
        feedback=commq.Feedback(rule="classic"),
        answer_feedback=commq.Feedback(rule="classic"),
        exempt=exempt,
    )
    module, optimizer = make(freeze_step=4, momentum_format=recipe)
    names = ("table", "matrix")
    x = {name: p.detach().clone() for name, p in module.named_parameters()}
    m, v = {n: torch.zeros(SHAPES[n]) for n in names}, {n: torch.zeros(SHAPES[n]) for n in names}
    live = {n: torch.ones(SHAPES[n], dtype=torch.bool) for n in names}
    live["table"][DEAD_ROWS] = False
    exchanges = {n: Exchange(world_size, int(live[n].sum()), fmt) for n in names}
    run(module, optimizer, range(4))
    for name in names:  # warm-up has its own test
        state = optimizer.state[module.get_parameter(name)]
        m[name], x[name] = state["exp_avg"].clone(), module.get_parameter(name).detach().clone()
        for step in range(4):
            total = torch.zeros(SHAPES[name])
            for rank in range(world_size):
                total += gradient(name, step, rank)
            v[name] = v[name].double().lerp((total / world_size).double() ** 2, 1 - BETAS[1])
        factor = torch.where(v[name] > 0, 1 / ((v[name] / (1 - BETAS[1] ** 4)).sqrt() + EPS), 0.0)
        assert bool(((state["precondition"] - factor).abs() <= factor_rounding(steps=4) * factor).all())
        v[name] = state["precondition"].clone()
    for step in range(4, 10):
        run(module, optimizer, [step])
        for name in names:
            local = [torch.lerp(gradient(name, step, rank), m[name], BETAS[0]) for rank in range(world_size)]
            m[name] = torch.zeros(SHAPES[name])
            m[name][live[name]] = exchanges[name].average([each[live[name]] for each in local])
            x[name] = torch.addcmul(x[name], m[name], v[name], value=-LR)
            assert torch.equal(module.get_parameter(name).detach(), x[name]), (name, step)


@thread_ranks(3)
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 500), (torch.bfloat16, 50)])
def test_rows_without_a_gradient_do_not_move(dtype, steps):
    module, optimizer = make(dtype=dtype)
    before = module.table.detach().clone()
    run(module, optimizer, range(5 + steps))
    assert torch.equal(module.table[DEAD_ROWS], before[DEAD_ROWS])
    assert not (module.table[: DEAD_ROWS.start] == before[: DEAD_ROWS.start]).any(dim=1).all()
    assert same_on_all_ranks(parameters_of(module))


@thread_ranks(3)
@pytest.mark.parametrize("fmt", ["eden1", "eden2", "lloyd1", "int2"])
def test_other_formats_move_no_unused_row_and_resume_to_the_bit(fmt):
    module, optimizer = make(momentum_format=fmt)
    before = module.table.detach().clone()
    run(module, optimizer, range(9))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    again, other = make(momentum_format=fmt)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    for each, opt in ((module, optimizer), (again, other)):
        run(each, opt, range(9, 14))
    assert torch.equal(parameters_of(module), parameters_of(again))
    assert torch.equal(module.table[DEAD_ROWS], before[DEAD_ROWS])
    assert same_on_all_ranks(parameters_of(module)) and not torch.equal(module.table, before)


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 5, 9], ids=["warm-up", "at the switch", "frozen"])
def test_a_loaded_state_goes_on_to_the_bit(stop, dtype):
    module, optimizer = make(dtype=dtype)
    run(module, optimizer, range(stop))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(module, optimizer, range(stop, 14))
    again, other = make(dtype=dtype)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    run(again, other, range(stop, 14))
    assert torch.equal(parameters_of(module), parameters_of(again))
    for name, values in optimizer.exchange.state_dict()["residual"]["values"].items():
        assert torch.equal(values, other.exchange.state_dict()["residual"]["values"][name])
        assert values.any()
    for state in other.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())


@thread_ranks(2)
def test_the_variance_freezes_when_it_is_stable_and_on_all_ranks_together():
    module, optimizer = make(freeze_step=None)  # looked at every 20 steps
    frozen_at = None
    for step in range(200):
        run(module, optimizer, [step])
        if optimizer.frozen:
            frozen_at = step + 1
            break
    assert frozen_at is not None and frozen_at % 20 == 0 and frozen_at > 20
    everyone = [None] * 2
    dist.all_gather_object(everyone, frozen_at)
    assert everyone[0] == everyone[1]


@thread_ranks(2)
def test_without_feedback_the_mean_is_not_reached():
    """A constant pull on all ranks and noise: feedback follows the pull where plain signs go astray."""
    errors = {}
    for feedback in ("none", "classic"):
        for fmt in ("sign", "fp32"):
            module = Weights()
            optimizer = OneBitAdam(
                module, LR, BETAS, EPS, freeze_step=20, momentum_format=fmt, feedback=feedback, group=dist.group.WORLD
            )
            target = {name: torch.ones(shape) for name, shape in SHAPES.items()}
            for step in range(300):
                for name, p in module.named_parameters():
                    noise = gradient(name, step, dist.get_rank())
                    p.grad = (p.detach() - target[name]) * torch.logspace(-2, 0, p.shape[-1]) + 0.1 * noise
                for group in optimizer.param_groups:
                    group["lr"] = LR * (1 - step / 300)
                optimizer.step()
            errors[feedback, fmt] = float((module.matrix.detach() - 1).square().mean())
    assert errors["none", "fp32"] == errors["classic", "fp32"]
    assert errors["classic", "sign"] < 2 * errors["classic", "fp32"] + 1e-4
    assert errors["none", "sign"] > 4 * errors["classic", "sign"]


@thread_ranks(2)
def test_frozen_steps_send_a_25th_of_fp32():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.nn.Parameter(torch.zeros(256, 512))
            self.bias = torch.nn.Parameter(torch.zeros(512))

    module = Wide()
    optimizer = OneBitAdam(module, freeze_step=1, group=dist.group.WORLD)
    before = optimizer.exchange.stats()
    for step in range(4):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if step == 0:
            before = optimizer.exchange.stats()
    after = optimizer.exchange.stats()
    assert before.ratio == 1.0
    assert (after.sent_bytes - before.sent_bytes) / (after.raw_bytes - before.raw_bytes) <= 0.04


@thread_ranks(3)
def test_an_optimizer_in_use_goes_back_to_the_bit():
    """From coded steps to others, and to warm-up, after which other elements may never have had a gradient."""
    module, optimizer = make(freeze_step=4)
    saved = {}
    for step in range(8):
        saved[step] = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
        run(module, optimizer, [step])
    end = parameters_of(module)
    for start in (6, 2):
        module.load_state_dict(saved[start][0])
        optimizer.load_state_dict(saved[start][1])
        run(module, optimizer, range(start, 8))
        assert torch.equal(parameters_of(module), end)

    optimizer.load_state_dict(saved[2][1])
    for step in range(2, 6):
        set_gradients(module, step)
        module.table.grad += 1.0
        optimizer.step()
    assert optimizer.frozen and optimizer.exchange.state_dict()["residual"]["values"]["table"].numel() == 40 * 72
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@thread_ranks(3)
@pytest.mark.parametrize("grows", [False, True])
def test_a_nan_of_one_rank_arrives_on_all_and_a_skipped_step_changes_nothing(grows):
    """grows: the scale has just grown, as it mostly has when a step is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=8 if grows else 100)
    module = Weights()
    optimizer = OneBitAdam(module, LR, BETAS, EPS, freeze_step=5, grad_scaler=scaler)
    optimizer.make_exchange(C10d())
    bucket = FlatBucket(list(module.parameters()))

    def step(number, poison=False):
        optimizer.zero_grad()
        scale = float(scaler.scale(torch.ones(())))  # as of a loss: also starts the scaler
        for (name, p), view in zip(module.named_parameters(), bucket.views, strict=True):
            view.copy_(gradient(name, number, dist.get_rank()) * scale)
            p.grad = view
        if poison and dist.get_rank() == 1:
            module.matrix.grad[3, 4] = float("nan")
        optimizer.exchange.exchange(bucket)
        scaler.step(optimizer)
        bad = bool(module.matrix.grad.isnan().any())
        scaler.update()
        return bad

    assert not any(step(number) for number in range(8))
    weights, before = parameters_of(module), copy.deepcopy(optimizer.state_dict())
    assert step(8, poison=True)
    assert scaler.get_scale() == (1024.0 if grows else 512.0)
    assert torch.equal(parameters_of(module), weights)
    optimizer.zero_grad()
    optimizer.exchange._begin()  # the next backward pass gives the residuals back
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())
    was, now = before["exchange"]["residual"], after["exchange"]["residual"]
    for name, values in was["values"].items():
        assert torch.equal(values / was["loss_scale"], now["values"][name] / now["loss_scale"]) and values.any()
    was, now = was["answer"], now["answer"]
    for name, runs in was["runs"].items():
        for (_, values), (_, again) in zip(runs, now["runs"][name], strict=True):
            assert torch.equal(values / was["loss_scale"], again / now["loss_scale"])
    step(9)
    assert same_on_all_ranks(parameters_of(module)) and parameters_of(module).isfinite().all()


def test_arguments_are_refused_with_a_reason():
    module = Weights()
    with pytest.raises(RuntimeError, match="nothing to exchange with"):
        OneBitAdam(module).step()
    with pytest.raises(ValueError, match="without warm-up there is no variance"):
        OneBitAdam(module, freeze_step=0)
    with pytest.raises(ValueError, match="betas in"):
        OneBitAdam(module, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="ranks would skip different steps"):
        OneBitAdam(module, group=object(), grad_scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("make", "warns"),
    [
        (lambda: OneBitAdam(Weights(), betas=(0.9, 0.95), freeze_step=1000), "about 20 steps"),
        (lambda: OneBitAdam(Weights(), betas=(0.9, 0.95)), "about 20 steps"),
        (lambda: OneBitAdam(Weights(), freeze_step=19), "about 19 steps"),
        (lambda: commq.optim.OneBitLamb(Weights(), betas=(0.9, 0.98), freeze_step=1000), "about 50 steps"),
        (lambda: commq.optim.ZeroOneAdam(Weights(), var_freeze_step=40, var_update_scaler=4), "about 14 steps"),
        (lambda: OneBitAdam(Weights(), betas=(0.9, 0.99), freeze_step=20), ""),
        (lambda: OneBitAdam(Weights()), ""),
        (lambda: commq.optim.ZeroOneAdam(Weights(), var_freeze_step=40), ""),
    ],
)
def test_a_variance_that_forgets_or_saw_little_is_warned_of(make, warns, caplog):
    make()
    found = [record.getMessage() for record in caplog.records if record.name == "commq"]
    assert len(found) == bool(warns) and warns in "".join(found)


@thread_ranks(2)
def test_ranks_that_would_send_something_else_are_refused():
    rank, options = dist.get_rank(), {"group": dist.group.WORLD}
    for make in (
        lambda: OneBitAdam(Weights(), freeze_step=20 + rank, **options),
        lambda: OneBitAdam(Weights(), freeze_step=20, betas=(0.9, 0.999 - 0.001 * rank), **options),
        lambda: commq.optim.ZeroOneAdam(Weights(), var_freeze_step=40, local_step_scaler=9 + rank, **options),
        lambda: commq.optim.OneBitSGD(Weights(), warmup_steps=rank, **options),
        lambda: (commq.optim.EFSignSGD if rank else commq.optim.SignSGD)(Weights(), **options),
    ):
        with pytest.raises(ValueError, match=r"the optimizer differs between ranks: rank 0 has .*, rank 1 has "):
            make()


@thread_ranks(1)
def test_a_step_too_many_or_too_few_is_refused():
    module, optimizer = make(freeze_step=1)
    run(module, optimizer, range(2))
    flat = optimizer._flat
    optimizer._exchange_now(flat)
    with pytest.raises(RuntimeError, match="second backward pass before step"):
        optimizer._exchange_now(flat)
    optimizer.zero_grad()
    set_gradients(module, 3)
    optimizer.step()
    optimizer._flat = None
    with pytest.raises(RuntimeError, match="without an exchange"):
        optimizer.step()
    with pytest.raises(ValueError, match="missing are"):
        OneBitAdam(module, params=[module.matrix], group=dist.group.WORLD)
