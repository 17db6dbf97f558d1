"""DDP with commq against plain DDP, on real processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commq
from commq.collectives.arguments import PIECE_BYTES
from commq.train.config import ModelConfig
from commq.train.model import GPT
from harness import process_ranks, run_processes
from recipe_bounds import mean_bound


class Net(nn.Module):
    """Odd shapes: nothing is a multiple of a block; `scale` is 1-D and exempt, `small` is exempt by size."""

    def __init__(self, width=130):
        super().__init__()
        self.first = nn.Linear(37, width)
        self.second = nn.Linear(width, 65)
        self.small = nn.Linear(65, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.small(torch.relu(self.second(torch.relu(self.first(x))))) * self.scale


def make(recipe, *, bucket_mb=25.0, dtype=torch.float32, width=130, grad_scaler=None):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Net(width).to(dtype), bucket_cap_mb=bucket_mb)
    handle = commq.register(ddp, recipe, grad_scaler=grad_scaler) if recipe else None
    return ddp, handle


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(16, 37, generator=generator).to(dtype)


def backward(ddp, step, dtype=torch.float32):
    ddp.zero_grad()
    ddp(batch(step, dtype)).square().mean().backward()


def grads(ddp):
    return torch.cat([p.grad.flatten() for p in ddp.parameters()])


def train(recipe, steps=4, **options):
    """Parameters after a few steps of AdamW, and the last stats."""
    ddp, handle = make(recipe, **options)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    for step in range(steps):
        backward(ddp, step)
        optimizer.step()
    return nn.utils.parameters_to_vector(ddp.parameters()).detach(), handle.stats()


def same_on_all_ranks(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return all(torch.equal(row, tensor) for row in rows)


@process_ranks(2, 3)
@pytest.mark.parametrize("recipe", [name for name in commq.recipes() if not commq.recipe(name).is_for_shards])
def test_gradients_are_those_of_plain_ddp_within_the_format(recipe):
    plain, _ = make(None)
    own, _ = make(None)
    ddp, handle = make(recipe)
    backward(plain, 0)
    with own.no_sync():
        backward(own, 0)
    backward(ddp, 0)
    exact, found = grads(plain), grads(ddp)
    assert same_on_all_ranks(found)
    for name, p in ddp.module.named_parameters():
        off = (p.grad - plain.module.get_parameter(name).grad).flatten().double()
        x = own.module.get_parameter(name).grad.flatten()
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        bound = mean_bound(handle.recipe, name, tuple(p.shape), torch.stack(rows))
        if handle.recipe.rotation is None:
            assert bool((off.abs() <= bound[: len(off)]).all()), name
        assert float(off.norm()) <= float(bound.norm()), name
    # Tighter, as these gradients are nearly Gaussian: the 2-norm error of both hops is sqrt(2) times one hop's
    # (sign keeps 64 % of the energy of such data; here a fifth of the elements are exact zeros as well).
    limits = {"fp32": 2e-7, "bf16": 4e-3, "fp8": 0.05, "int8": 0.02, "int4": 0.25, "int2": 1.2, "onebit": 1.2}
    assert float((found - exact).norm() / exact.norm()) < limits.get(recipe, torch.inf)


@process_ranks(3)
@pytest.mark.parametrize("recipe", ["int4", "onebit"])
def test_bits_do_not_depend_on_the_buckets(recipe):
    for overrides in ({}, {"rounding": "stochastic"}, {"rotation": 64}):
        chosen = commq.recipe(recipe, **overrides)
        whole, _ = train(chosen)
        pieces, _ = train(chosen, bucket_mb=0.01)
        assert same_on_all_ranks(whole)
        assert torch.equal(whole, pieces), overrides


@process_ranks(2)
def test_aligned_buckets_are_encoded_in_place_to_the_same_bits():
    """128-wide layers need no copy; splitting them over buckets changes nothing either."""
    results = [train("int4", width=128, bucket_mb=mb)[0] for mb in (25.0, 0.01)]
    assert torch.equal(*results)


@process_ranks(3)
@pytest.mark.parametrize("width", [128, 130], ids=["in place", "copied"])
def test_bits_do_not_depend_on_the_pieces(width, monkeypatch):
    classic = commq.Feedback(rule="classic", storage="int8")
    for recipe, overrides in (
        ("int4", {"rounding": "stochastic"}),
        ("int4", {"feedback": classic}),
        ("onebit", {"feedback": "classic"}),
    ):
        chosen = commq.recipe(recipe, **overrides)
        whole, _ = train(chosen, width=width)
        monkeypatch.setitem(PIECE_BYTES, "cpu", 1 << 12)
        pieces, _ = train(chosen, width=width)
        monkeypatch.undo()
        assert torch.equal(whole, pieces), (recipe, overrides)


@process_ranks(2)
def test_two_runs_are_bit_identical():
    assert torch.equal(train("int4")[0], train("int4")[0])


@process_ranks(2, 4)
def test_bytes_sent():
    """Of the quickstart's model: exemptions, scales and padding included."""
    model = GPT(ModelConfig())
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    ratios = {}
    for name in ("fp32", "bf16", "int8", "int4", "onebit"):
        ddp = DistributedDataParallel(model)
        handle = commq.register(ddp, name)
        ddp(tokens).square().mean().backward()
        ratios[name] = handle.stats().ratio
    assert ratios["fp32"] == 1.0 and ratios["bf16"] == 0.5
    assert ratios["int8"] <= 0.27 and ratios["int4"] <= 0.14 and ratios["onebit"] <= 0.05


@process_ranks(2)
def test_pytorchs_own_two_lines():
    ddp, _ = make(None)
    state = commq.HookState("int4")
    ddp.register_comm_hook(state, commq.comm_hook)
    backward(ddp, 0)
    registered, _ = make("int4")
    backward(registered, 0)
    assert torch.equal(grads(ddp), grads(registered))
    assert state.stats().steps == 1
    names = state.state_dict()["residual"]["values"]
    assert len(names) == 2 and all(name.startswith("parameter.") for name in names)


@process_ranks(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    ddp, _ = make("int8", dtype=dtype)
    plain, _ = make(None, dtype=dtype)
    backward(ddp, 0, dtype)
    backward(plain, 0, dtype)
    found, exact = grads(ddp), grads(plain)
    assert found.dtype == dtype and same_on_all_ranks(found)
    assert float((found - exact).float().norm() / exact.float().norm()) < 0.03


@process_ranks(2)
def test_no_sync_exchanges_once():
    ddp, handle = make("fp32")
    with ddp.no_sync():
        ddp(batch(0)).square().mean().backward()
    assert handle.stats().steps == 0 and handle.stats().sent_bytes == 0
    ddp(batch(1)).square().mean().backward()
    assert handle.stats().steps == 1
    accumulated = grads(ddp)
    plain, _ = make(None)
    with plain.no_sync():
        plain(batch(0)).square().mean().backward()
    plain(batch(1)).square().mean().backward()
    assert float((accumulated - grads(plain)).norm() / grads(plain).norm()) < 2e-7


@process_ranks(2)
def test_nan_on_one_rank_skips_the_step_everywhere():
    """GradScaler sees the NaN on all ranks, residuals stay finite and follow the scale, training goes on."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ddp, handle = make("int4", grad_scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    parameters = nn.utils.parameters_to_vector
    for step in range(6):
        before = parameters(ddp.parameters()).detach().clone()
        optimizer.zero_grad()
        loss = ddp(batch(step)).square().mean()
        if step == 2 and dist.get_rank() == 1:
            loss = loss * float("nan")
        scaler.scale(loss).backward()
        assert bool(grads(ddp).isnan().any()) == (step == 2)
        scaler.step(optimizer)
        scaler.update()
        after = parameters(ddp.parameters()).detach()
        assert torch.equal(before, after) == (step == 2)
        assert same_on_all_ranks(after) and bool(after.isfinite().all())
        values = handle.state_dict()["residual"]["values"]
        assert all(bool(v.isfinite().all()) for v in values.values())
    assert scaler.get_scale() == 2.0**9
    assert handle.residual.loss_scale == 2.0**9


@process_ranks(2)
def test_resume_is_bit_exact(tmp_path):
    """Saved in the middle: the residuals, and everything after, are those of the run that went on."""
    ddp, handle = make("int4")
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    for step in range(3):
        backward(ddp, step)
        optimizer.step()
    file = tmp_path / f"rank{dist.get_rank()}.pt"
    torch.save([ddp.module.state_dict(), optimizer.state_dict(), handle.state_dict()], file)
    again, resumed = make("int4")
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    model_state, optimizer_state, handle_state = torch.load(file, weights_only=True)
    again.module.load_state_dict(model_state)
    fresh.load_state_dict(optimizer_state)
    resumed.load_state_dict(handle_state)
    for step in range(3, 6):
        for model, opt in ((ddp, optimizer), (again, fresh)):
            backward(model, step)
            opt.step()
        assert torch.equal(grads(ddp), grads(again))
    assert handle.stats().steps == resumed.stats().steps == 6
    assert handle.stats().sent_bytes == resumed.stats().sent_bytes


class Odd(nn.Module):
    """No parameter is a whole number of blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(37, 101), nn.GELU(), nn.Linear(101, 77), nn.GELU(), nn.Linear(77, 65))

    def forward(self, x):
        return self.layers(x)


@process_ranks(2)
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_resume_is_bit_exact_where_padding_is_sent_too(storage):
    """Signs and rotated runs send something for padding: its residual must not survive in one run only."""

    def start():
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Odd())
        feedback = commq.Feedback(rule="classic", storage=storage)
        handle = commq.register(ddp, commq.recipe("onebit", feedback=feedback))
        return ddp, handle, torch.optim.SGD(ddp.parameters(), lr=0.1)

    ddp, handle, optimizer = start()
    for step in range(3):
        backward(ddp, step)
        optimizer.step()
    again, resumed, fresh = start()
    again.module.load_state_dict(ddp.module.state_dict())
    resumed.load_state_dict(handle.state_dict())
    for step in range(3, 6):
        for model, opt in ((ddp, optimizer), (again, fresh)):
            backward(model, step)
            opt.step()
        assert torch.equal(grads(ddp), grads(again))


@process_ranks(2)
def test_exempt_float16_gradients_stay_float16():
    ddp = DistributedDataParallel(nn.Linear(16, 16, dtype=torch.float16))
    commq.register(ddp, "int4")
    ddp(torch.full((1, 16), 65504.0, dtype=torch.float16)).sum().backward()
    assert bool((ddp.module.weight.grad == 65504.0).all())


@process_ranks(2)
def test_what_cannot_be_encoded_is_an_error():
    for dtype, says in ((torch.complex64, "sparse or complex"), (torch.float64, "gradients are torch.float64")):
        ddp = DistributedDataParallel(nn.Linear(64, 64, dtype=dtype))
        commq.register(ddp, "int4")
        with pytest.raises(TypeError, match=says):
            ddp(torch.randn(4, 64).to(dtype)).abs().mean().backward()


@process_ranks(2)
def test_state_of_another_model_is_refused():
    ddp, handle = make("int4")
    backward(ddp, 0)
    other = commq.register(DistributedDataParallel(Odd()), "int4")
    with pytest.raises(ValueError, match=r"residual of 'first.weight' has 4810 elements, the module's has 0"):
        other.load_state_dict(handle.state_dict())
    with pytest.raises(ValueError, match="saved with"):
        make("int8")[1].load_state_dict(handle.state_dict())


def register_unknown_recipe():
    try:
        commq.register(DistributedDataParallel(Net()), ["int4", "int5"][dist.get_rank()])
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_unknown_recipe_on_one_rank_fails_on_every_rank():
    first, second = run_processes(register_unknown_recipe, 2)
    assert first == second and "recipe 'int5' is unknown" in first


def register_own_recipe():
    torch.manual_seed(0)
    rank = dist.get_rank()
    ddp = DistributedDataParallel(Net())
    found = []
    for recipe, check_every in (("int4" if rank else commq.recipe("int4", block=64), 0), ("int4", 2 - rank)):
        with pytest.raises(ValueError, match="differs between ranks") as raised:
            commq.register(ddp, recipe, check_every=check_every)
        found.append(str(raised.value))
    return found


def test_different_arguments_fail_on_every_rank():
    messages, checks = zip(*run_processes(register_own_recipe, 3), strict=True)
    assert set(checks) == {
        "check_every differs between ranks: rank 0 has 2, rank 1 has 1; start every rank with the same one"
    }
    assert len(set(messages)) == 1
    assert "the recipe differs between ranks: rank 0 has Recipe(name='int4'" in messages[0]
    assert "rank 1 has Recipe(name='int4'" in messages[0] and "block=64" in messages[0]


def test_register_wants_ddp():
    with pytest.raises(TypeError, match="got Net, expected DistributedDataParallel"):
        commq.register(Net(), "int4")
