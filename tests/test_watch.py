"""What can be seen of a handle: scalars, profiler ranges, and whether replicas are still the same."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import commq
from against_plain import Net, backward
from commq.attach.check import bit_hash
from commq.collectives import link
from commq.collectives.link import Curve
from fake_bucket import Recorder, buckets_of
from harness import process_ranks, run_processes


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name] = value, step


def step_of(state):
    parameters = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    for bucket in buckets_of(*([p] for p in parameters)):
        commq.comm_hook(state, bucket)


def test_scalars():
    state, writer = commq.HookState("int4", transport=Recorder()), Writer()
    step_of(state)
    state.write(writer)
    stats = state.stats()
    assert writer.scalars["commq/sent_bytes"] == (stats.sent_bytes, 1)
    assert writer.scalars["commq/ratio"] == (stats.ratio, 1) and 0 < stats.ratio < 0.2
    assert set(writer.scalars) == {
        f"commq/{name}"
        for name in ("steps", "raw_bytes", "sent_bytes", "received_bytes", "seconds", "residual_norm", "ratio")
    }
    state.write(writer, step=70)
    assert {step for _, step in writer.scalars.values()} == {70}


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    state = commq.HookState("int4", transport=Recorder())
    step_of(state)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        state.write(writer)
    assert any(file.stat().st_size > 0 for file in tmp_path.iterdir())


def test_profiler_ranges():
    state = commq.HookState("int4", transport=Recorder())
    step_of(state)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step_of(state)
    names = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("commq::")}
    ranges = ("commq::bucket 0", "commq::bucket 1", "commq::two_shot.0", "commq::two_shot.1", "commq::two_shot.2")
    assert [names[name] for name in ranges] == [1, 1, 2, 2, 2]


# Replicas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_hash_sees_every_bit(dtype):
    x = (torch.randn(1003, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    known, others = int(bit_hash(x)), []
    for element in (0, 1, 500, 1002):
        for bit in range(8 * x.element_size()):
            other = x.clone()
            other.view(ints)[element] ^= torch.ones((), dtype=ints) << bit
            others.append(int(bit_hash(other)))
    swapped = x.clone()
    swapped[[3, 900]] = x[[900, 3]]
    others.append(int(bit_hash(swapped)))
    assert len(others) == 1 + 4 * 8 * x.element_size() and known not in others
    assert int(bit_hash(x.view(17, 59).t())) == int(bit_hash(x.view(17, 59).t().contiguous()))
    assert int(bit_hash(x[:0])) == 0


def diverge():
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Net())
    commq.register(ddp, "int8", check_every=2)
    says = []
    for step in range(6):
        if step == 3 and dist.get_rank() == 1:
            with torch.no_grad():
                ddp.module.second.weight[5, 7] += 2.0**-20
                ddp.module.scale[3] = 5.0
        try:
            backward(ddp, step)
        except commq.ReplicaError as error:
            says.append((step, str(error), error.name, error.ranks))
            break
    return says


def test_replicas_that_differ_are_an_error_on_every_rank():
    """Changed before step 3, found before step 4. `scale` comes first in the module."""
    first, *others = run_processes(diverge, 3)
    assert all(other == first for other in others)
    ((step, message, name, ranks),) = first
    assert (step, name, ranks) == (4, "scale", (1,))
    assert "parameter 'scale' differs on rank 1 from the other ranks (2 of 5 parameters differ)" in message


@process_ranks(2)
def test_replicas_that_agree():
    ddp = DistributedDataParallel(Net())
    handle = commq.register(ddp, "onebit", check_every=1)
    optimizer = torch.optim.AdamW(ddp.parameters())
    for step in range(4):
        backward(ddp, step)
        optimizer.step()
    assert handle.stats().steps == 4


def test_checks_need_the_module():
    with pytest.raises(ValueError, match="check_every=3, module=NoneType: expected"):
        commq.HookState("int8", transport=Recorder(), check_every=3)


# Schedule auto


class Sized(nn.Module):
    """One large parameter and many small ones, in buckets of their own."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(512, 512, bias=False), nn.Linear(512, 8, bias=False)

    def forward(self, x):
        return self.small(self.large(x))


def take_curves(nanoseconds):
    """In place of measurements: a link that takes so long for a megabyte, without latency, and slow codecs."""
    moves, codecs = Curve(((0, 0), (10**6, nanoseconds))), Curve(((0, 5 * 10**6), (10**6, 6 * 10**6)))
    link.remember = lambda transport, key, find: codecs if key[0] == "codecs" else moves


def train_auto(nanoseconds, name="int4", **parts):
    messages = []

    class Kept(logging.Handler):
        def emit(self, record):
            messages.append((record.levelname, record.getMessage()))

    logging.getLogger("commq").addHandler(Kept())
    logging.getLogger("commq").setLevel(logging.INFO)
    take_curves(nanoseconds)
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Sized(), bucket_cap_mb=0.01)
    recipe = commq.recipe(name, schedule="auto", exempt=commq.Exempt(min_numel=0), **parts)
    handle = commq.register(ddp, recipe)
    for step in range(3):
        ddp.zero_grad()
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(step))  # the same on all ranks
        ddp(x).square().mean().backward()
    routes = {known.nbytes: known.route.name for known in handle._layouts._known.values()}
    exact = torch.autograd.grad(ddp.module(x).square().mean(), list(ddp.parameters()))
    errors = [float((p.grad - g).norm() / g.norm()) for p, g in zip(ddp.parameters(), exact, strict=True)]
    return routes, messages, errors, handle.stats()


def test_auto_compresses_large_buckets_on_a_slow_link_and_says_so_once():
    """16 KiB over 10 MB/s take less than the codec's 5 ms; 1 MiB does not."""
    results = run_processes(train_auto, 2, args=(10**8,))
    for routes, _, _, stats in results:
        assert routes[1 << 20] in ("one_shot", "two_shot") and routes[1 << 14] == "plain"
        assert stats.ratio < 0.3 and stats.residual_norm > 0
    assert results[0][0] == results[1][0]
    assert len(results[0][1]) == 1 and results[1][1] == []


def test_auto_leaves_gradients_to_ddp_where_nothing_gains_and_says_so_once():
    """A megabyte in a nanosecond."""
    results = run_processes(train_auto, 2, args=(1,))
    for routes, _, errors, stats in results:
        assert routes == {} and max(errors) == 0 and stats.residual_norm == 0
        assert stats.steps == 3 and stats.ratio == 1.0
    ((level, message),) = results[0][1]
    assert level == "WARNING" and "no hook" in message and "of 1064960 bytes of gradients" in message
    assert results[1][1] == []


def count_aside():
    """Frozen and ignored parameters, accumulation and validation, on a link where nothing gains."""
    take_curves(1)
    model = Sized()
    model.frozen, model.ignored = nn.Linear(10, 10).requires_grad_(False), nn.Linear(30, 30)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["ignored.weight", "ignored.bias"])
    ddp = DistributedDataParallel(model)
    handle = commq.register(ddp, commq.recipe("int4", schedule="auto"))
    for _ in range(2):
        with ddp.no_sync():
            ddp(torch.ones(4, 512)).sum().backward()
        ddp(torch.ones(4, 512)).sum().backward()
        with torch.no_grad():
            ddp(torch.ones(4, 512))
    return handle.stats()


def test_what_ddp_sends_by_itself_is_counted_by_what_it_reduces():
    for stats in run_processes(count_aside, 2):
        assert stats.steps == 2 and stats.raw_bytes == stats.sent_bytes == 2 * 4 * (512 * 512 + 512 * 8)


def check_in_join():
    take_curves(1)
    ddp = DistributedDataParallel(Sized())
    handle = commq.register(ddp, commq.recipe("int4", schedule="auto"), check_every=1)
    with ddp.join():
        for _ in range(2 + dist.get_rank()):
            ddp(torch.ones(4, 512)).sum().backward()
    return handle.stats().steps


def test_replicas_are_compared_in_join_where_nothing_gains():
    """A rank without inputs makes no forward pass, so the hook compares them."""
    assert run_processes(check_in_join, 2) == [3, 3]


@pytest.mark.parametrize("parts", [{"name": "fp32"}, {"phases": ({"format": "fp32", "steps": 9},)}])
def test_auto_does_not_round_what_the_recipe_sends_in_fp32(parts):
    for _, _, errors, stats in run_processes(train_auto, 2, args=(10**6,), kwargs=parts):
        assert max(errors) == 0 and stats.ratio == 1


@pytest.mark.parametrize("name", ["int4", "qsgd"])
def test_auto_switches_compression_off_where_it_loses_and_says_so_once(name):
    """At 1 GB/s half the bytes save half a millisecond, and int4 costs ten."""
    results = run_processes(train_auto, 2, args=(10**6, name))
    for routes, _, errors, stats in results:
        assert set(routes.values()) == {"plain"}
        # Sums of two equal bfloat16 are exact: gradients are rounded once, and half the bytes of fp32 travel.
        assert 0 < max(errors) <= 2.0**-9 and stats.residual_norm == 0 and stats.ratio == 0.5
    ((level, message),) = results[0][1]
    assert level == "WARNING" and "plain for" in message and "of 1064960 bytes: " in message and "bf16" in message
    assert results[1][1] == []
