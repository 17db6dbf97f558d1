"""Every mode of DistributedDataParallel with commq, each against plain DDP."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint

import commq
from against_plain import (
    LIMITS,
    Mixed,
    Net,
    backward,
    batch,
    check,
    close,
    error,
    grads_of,
    loss,
    run,
    same_bits,
    same_on_all_ranks,
    vector,
)
from commq.collectives.arguments import PIECE_BYTES
from harness import process_ranks


def ddp_of(model=Net, **options):
    return lambda: DistributedDataParallel(model(), **options)


# Numbers


@process_ranks(2)
def test_dtypes():
    def low(dtype, scale, model, number):
        (model(batch(number, dtype=dtype)).float().square().mean() * scale).backward()

    def autocast(model, number):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch(number))
        out.float().square().mean().backward()

    check(ddp_of(Net))
    check(ddp_of(lambda: Net().bfloat16()), partial(low, torch.bfloat16, 1))
    check(ddp_of(Mixed))
    check(ddp_of(Mixed, bucket_cap_mb=0.001))
    check(ddp_of(Net), autocast)

    half = ddp_of(lambda: Net().half())
    check(half, partial(low, torch.float16, 2.0**10), exact=False)
    exact, found = (
        run(half, partial(low, torch.float16, 2.0**10), recipe, steps=1).grads[0] for recipe in (None, "fp32")
    )
    for name, grad in exact.items():  # halving rounds subnormals, which plain DDP does twice and commq once
        assert bool(((found[name].float() - grad.float()).abs() <= 2.0**-24).all()), name


@process_ranks(3)
def test_three_ranks_differ_by_the_order_of_the_sum():
    """Plain DDP multiplies by fl(1/3), then adds twice: 4 roundings. commq adds twice, then divides: 3 or 4."""
    exact, found = (run(ddp_of(), backward, recipe, steps=1).grads[0] for recipe in (None, "fp32"))
    torch.manual_seed(0)
    ddp = ddp_of()()
    with ddp.no_sync():
        backward(ddp, 0)
    for name, p in ddp.named_parameters():
        size = p.grad.abs()
        dist.all_reduce(size)
        assert bool(((found[name] - exact[name]).abs() <= 8 * 2.0**-24 * size / 3).all()), name
    assert same_on_all_ranks(vector(found.values()))


# DDP's arguments


class Branches(nn.Module):
    """`second` is used on rank 1 only, `third` on no rank."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(37, 65) for _ in range(3))
        self.last = nn.Linear(65, 64)

    def forward(self, x):
        y = self.first(x)
        return self.last(torch.relu(y + self.second(x) if dist.get_rank() == 1 else y))


class OneBranch(Branches):
    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@process_ranks(2)
def test_unused_parameters():
    for view in (False, True):
        check(ddp_of(Branches, find_unused_parameters=True, gradient_as_bucket_view=view))
        check(ddp_of(Branches, find_unused_parameters=True, gradient_as_bucket_view=view, bucket_cap_mb=0.01))
        check(ddp_of(OneBranch, static_graph=True, gradient_as_bucket_view=view, bucket_cap_mb=0.01))


def accumulate(model, number):
    """Three passes, one exchange."""
    with model.no_sync():
        backward(model, 3 * number)
        backward(model, 3 * number + 1)
    backward(model, 3 * number + 2)


def accumulate_in_two_contexts(model, number):
    for part in range(3):
        with model.no_sync() if part < 2 else nullcontext():
            backward(model, 3 * number + part)


def two_passes(model, number):
    (loss(model, 2 * number) + loss(model, 2 * number + 1)).backward()


@process_ranks(2)
def test_gradient_views_and_accumulation():
    for view in (False, True):
        for step in (backward, accumulate, accumulate_in_two_contexts, two_passes):
            check(ddp_of(gradient_as_bucket_view=view, bucket_cap_mb=0.01), step)
        unused = ddp_of(Branches, find_unused_parameters=True, gradient_as_bucket_view=view)
        check(unused, accumulate)
    # PyTorch fails if the first pass of a static graph is one without an exchange.
    check(ddp_of(static_graph=True), lambda model, number: (accumulate if number else backward)(model, number))


class WithBuffers(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(65)

    def forward(self, x):
        return self.norm(super().forward(x))


@process_ranks(2)
def test_other_arguments(monkeypatch):
    check(ddp_of(static_graph=True, gradient_as_bucket_view=True))
    check(ddp_of(bucket_cap_mb_list=[0.001, 25]))  # a tiny bucket, then one for the rest
    check(ddp_of(batched_grad_copy=True, bucket_cap_mb=0.01))
    check(ddp_of(init_sync=False))
    for sync in (False, True):
        check(ddp_of(WithBuffers, forward_sync_buffers=sync))
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1 << 11)  # a huge one: it travels in many pieces
    check(ddp_of(bucket_cap_mb_list=[0.001, 25]))


@process_ranks(2)
def test_skipped_unused_parameters():
    """Their gradients are not exchanged at all: whole buckets are left out, here the first and the last."""
    build = ddp_of(OneBranch, find_unused_parameters=True, skip_all_reduce_unused_params=True, bucket_cap_mb=0.001)
    plain = run(build, backward, None)
    for name, grad in run(build, backward, "fp32").grads[-1].items():
        assert grad is None or torch.equal(grad, plain.grads[-1][name])
    close(run(build, backward, "int8").grads[0], plain.grads[0], LIMITS["int8"])


# What parameters look like


class Layouts(nn.Module):
    """Weights that are channels_last, transposed, and a view with gaps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 5), nn.Conv2d(24, 48, 3)
        self.transposed = nn.Parameter(torch.randn(64, 48).t())
        self.gaps = nn.Parameter(torch.randn(48, 128)[:, ::2])

    def forward(self, x):
        return self.second(torch.relu(self.first(x))).mean((2, 3)) @ (self.transposed + self.gaps)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.layer, self.head = nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 100, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.layer(self.tokens(tokens))))


class Empty(Net):
    """Parameters of no elements, first, in the middle and last."""

    def __init__(self):
        super().__init__()
        self.none, self.none_2d = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0, 5))
        self.last = nn.Linear(65, 40)
        self.end = nn.Parameter(torch.zeros(3, 0))

    def forward(self, x):
        return self.last(super().forward(x)) + self.none.sum() + self.none_2d.sum() + self.end.sum()


@process_ranks(2)
def test_layouts_tied_and_empty_parameters():
    def images(model, number):
        model(batch(number, 4, 3, 12, 12)).square().mean().backward()

    def tokens(model, number):
        model((batch(number, 8, 16) * 1000).long() % 100).square().mean().backward()

    for cap in (25, 0.001):
        for view in (False, True):
            options = {"bucket_cap_mb": cap, "gradient_as_bucket_view": view}
            check(ddp_of(lambda: Layouts().to(memory_format=torch.channels_last), **options), images)
        check(ddp_of(Tied, bucket_cap_mb=cap), tokens)
        check(ddp_of(Empty, bucket_cap_mb=cap))
        # With nothing exempt, parameters of no elements are among those that are encoded.
        everything = commq.recipe("int4", exempt=commq.Exempt(one_dimensional=False, min_numel=0))
        found = run(ddp_of(Empty, bucket_cap_mb=cap), backward, everything)
        close(found.grads[0], run(ddp_of(Empty), backward, None).grads[0], LIMITS["int4"])


# Groups of ranks


@process_ranks(3)
def test_a_group_of_ranks():
    """Ranks 0 and 2 train, rank 1 does something else."""
    group, alone = dist.new_group([0, 2]), [dist.new_group([rank]) for rank in range(3)][dist.get_rank()]
    if dist.get_rank() != 1:
        check(ddp_of(process_group=group), group=group)
        handle = commq.register(ddp_of(process_group=group)(), "int4")
        assert (handle.transport.rank, handle.transport.world_size) == (dist.get_rank() // 2, 2)
    single = ddp_of(process_group=alone)
    same_bits(run(single, backward, "int4"), run(single, backward, None))  # one rank sends nothing and rounds nothing


@process_ranks(4)
def test_one_dimension_of_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    replicas = mesh["replicas"]

    def same_for_shards(model, number):
        x = torch.randn(16, 37, generator=torch.Generator().manual_seed(10 * number + replicas.get_local_rank()))
        model(x).square().mean().backward()

    def sharded():
        model = nn.Sequential(nn.Linear(37, 132), nn.ReLU(), nn.Linear(132, 66))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return DistributedDataParallel(parallelize_module(model, mesh["shards"], plan), device_mesh=replicas)

    check(ddp_of(device_mesh=replicas), group=replicas.get_group())
    check(ddp_of(process_group=mesh.get_group("shards")), group=mesh.get_group("shards"))
    check(sharded, same_for_shards, group=replicas.get_group())  # with tensor parallelism inside


# torch.compile and checkpointing


@process_ranks(2)
@pytest.mark.parametrize("outer", [True, False], ids=["compiled DDP", "DDP of a compiled module"])
def test_compile(outer):
    """With aot_eager: inductor took 27 s for this test, and gave the same results. 1 MiB: the graph is split in two."""

    def build():
        torch._dynamo.reset()
        net = Net(2700)
        if outer:
            return torch.compile(DistributedDataParallel(net), backend="aot_eager")
        return DistributedDataParallel(torch.compile(net, backend="aot_eager"))

    check(build, steps=2, recipes=("int4",))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, repeats=1):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(37, 64), nn.Linear(64, 64), nn.Linear(64, 50)
        self.reentrant, self.repeats = reentrant, repeats

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.repeats):
            x = checkpoint(self.second, x, use_reentrant=self.reentrant)
        return self.third(torch.relu(x))


@process_ranks(2)
def test_checkpointing():
    for reentrant in (True, False):
        for static in (True, False):
            for view in (True, False):
                options = {"static_graph": static, "gradient_as_bucket_view": view, "bucket_cap_mb": 0.01}
                check(ddp_of(partial(Checkpointed, reentrant), **options))
    check(ddp_of(partial(Checkpointed, True, 2), static_graph=True))  # PyTorch allows two only in static graphs


# What is refused, and by whom


def refused_modes():
    """What each attempt says on this rank."""

    def attempt(name, action):
        try:
            action()
        except Exception as error:
            says[name] = f"{type(error).__name__}: {error}"

    def sparse():
        ddp = DistributedDataParallel(nn.Sequential(nn.Embedding(100, 64, sparse=True), nn.Linear(64, 64)))
        commq.register(ddp, "int4")
        ddp(torch.arange(10)).sum().backward()

    def in_backward():
        net = Net()
        _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1})
        ddp = DistributedDataParallel(net)
        commq.register(ddp, "int4")
        backward(ddp, 0)

    def native_mixed_precision():
        ddp = DistributedDataParallel(Net(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
        commq.register(ddp, "int4")

    def twice():
        ddp = DistributedDataParallel(Net())
        handles = [commq.register(ddp, "fp32")]
        try:
            commq.register(ddp, "int4")
        finally:  # the first one is still there and works
            backward(ddp, 0)
            says["steps"] = handles[0].stats().steps

    says = {}
    attempt("sparse", sparse)
    attempt("in backward", in_backward)
    attempt("mixed precision", native_mixed_precision)
    attempt("twice", twice)
    attempt("frozen", lambda: DistributedDataParallel(Net().requires_grad_(False)))
    attempt("compiled", lambda: commq.register(torch.compile(DistributedDataParallel(Net())), "int4"))
    return says


@process_ranks(2)
def test_refused():
    says = refused_modes()
    assert "TypeError" in says["sparse"] and "use Embedding(sparse=False)" in says["sparse"]
    assert "got OptimizedModule, expected DistributedDataParallel" in says["compiled"]
    # By PyTorch: DDP has one hook, and these modes install their own.
    for name in ("twice", "mixed precision", "in backward"):
        assert says[name] == (
            "RuntimeError: register_comm_hook or register_builtin_comm_hook can only be called once."
        ), name
    assert "DistributedDataParallel is not needed" in says["frozen"]
    assert says["steps"] == 1


@process_ranks(2)
def test_delayed_all_reduce_goes_past_the_hook():
    """PyTorch sums these parameters itself, and does not wait for it: the others are those of plain DDP."""

    def build():
        net = Net()
        delayed = [("first.weight", net.first.weight)]
        return DistributedDataParallel(
            net, delay_all_reduce_named_params=delayed, param_to_hook_all_reduce=net.first.bias
        )

    def grads(recipe):
        torch.manual_seed(0)
        ddp = build()
        handle = commq.register(ddp, recipe) if recipe else None
        backward(ddp, 0)
        dist.barrier()
        known = dict(ddp.module.named_parameters())
        return grads_of({name: known[name] for name in known if name != "first.weight"}), handle

    plain, _ = grads(None)
    fp32, handle = grads("fp32")
    assert all(torch.equal(fp32[name], grad) for name, grad in plain.items())
    assert handle.stats().raw_bytes == 4 * sum(grad.numel() for grad in plain.values())
    int8, _ = grads("int8")
    assert all(error(int8[name], grad) < LIMITS["int8"] for name, grad in plain.items())
