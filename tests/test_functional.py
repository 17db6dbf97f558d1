"""Differentiable exchanges: the collectives forward, their adjoints backward, the same bytes when recomputed."""

import os
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import commq
import commq.functional as F
from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel
from commq.codecs.bounds import error_bound
from commq.collectives import lost
from harness import RankError, process_ranks, rank_generator, run_processes, run_threads, thread_ranks
from test_schedules import gather

WORLD_SIZES = (1, 2, 3, 4, 8)


def exact(kind, x, dim=0):
    """What each function computes without codecs, of whole numbers; and the gradient of sum(result * weight)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everyone = gather(x)
    return {
        "all_reduce": lambda: sum(everyone),
        "all_gather": lambda: torch.cat(everyone, dim),
        "reduce_scatter": lambda: sum(everyone).chunk(world_size, dim)[rank],
        "all_to_all": lambda: torch.cat([each.chunk(world_size)[rank] for each in everyone]),
        "replicate": lambda: x,
        "shard": lambda: x.chunk(world_size, dim)[rank],
    }[kind]()


CALLS = {
    "all_reduce": lambda x, dim, **options: F.all_reduce(x, **options),
    "all_gather": lambda x, dim, **options: F.all_gather(x, dim=dim, **options),
    "reduce_scatter": lambda x, dim, **options: F.reduce_scatter(x, dim=dim, **options),
    "all_to_all": lambda x, dim, **options: F.all_to_all(x, **options),
    "replicate": lambda x, dim, **options: F.replicate(x, **options),
    "shard": lambda x, dim, **options: F.shard(x, dim=dim, **options),
}
INT4 = commq.get_format("int4", block=64)
ADJOINT = {
    "all_reduce": "all_reduce",
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
    "replicate": "all_reduce",
    "shard": "all_gather",
}


def whole_numbers(shape, seed):
    """At most 7 in size: their sums over 8 ranks are exact in bfloat16 and float16."""
    return torch.randint(-7, 8, shape, generator=rank_generator(seed)).to(torch.float32)


@thread_ranks(*WORLD_SIZES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_raw_formats_give_the_plain_values_and_gradients(dim):
    world_size = dist.get_world_size()
    for kind, call in CALLS.items():
        x = whole_numbers((2 * world_size, 3 * world_size, world_size), 1).requires_grad_()
        y = call(x, dim, format="fp32")
        assert torch.equal(y, exact(kind, x.detach(), dim)), kind
        weight = whole_numbers(y.shape, 2)
        (y * weight).sum().backward()
        assert torch.equal(x.grad, exact(ADJOINT[kind], weight, dim)), kind


@thread_ranks(2, 3)
def test_finite_differences_where_the_path_is_linear():
    """Of the sum of the ranks' losses, one element of one rank's input at a time; steps and values are exact."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for kind, call in CALLS.items():
        x = whole_numbers((world_size, 2 * world_size), 3).requires_grad_()

        def loss(x, kind=kind, call=call):
            y = call(x, 1, format="fp32")
            return (y * whole_numbers(y.shape, 4)).sum()

        if kind in ("replicate", "shard"):  # of values that are the same on all ranks
            with torch.no_grad():
                dist.broadcast(x, 0)
        loss(x).backward()
        for index in ((0, 0), (world_size - 1, world_size + 1)):
            moved = x.detach().clone()
            if kind in ("replicate", "shard") or rank == world_size - 1:
                moved[index] += 1.0
            difference = torch.stack([loss(moved) - loss(x.detach())])
            dist.all_reduce(difference)
            if rank == world_size - 1:
                assert float(difference) == float(x.grad[index]), kind


@thread_ranks(2, 3)
@pytest.mark.parametrize("format", ["int4", "spike3", "sign"])
def test_gradients_are_those_of_what_was_decoded(format):
    """Central differences of sum(y**2 / 2) at the decoded y, which are exact in float64, through the plain adjoint."""
    world_size, step = dist.get_world_size(), 0.125
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        x = torch.randn(world_size, 300, generator=rank_generator(12)).requires_grad_()
        y = CALLS[kind](x, 0, format=format, backward="fp32")
        (y.square() / 2).sum().backward()
        high, low = (y.detach().double() + sign * step for sign in (1, -1))
        differences = (high.square() / 2 - low.square() / 2) / (2 * step)
        assert torch.equal(x.grad, exact(ADJOINT[kind], differences.float())), kind
        assert not torch.equal(y.detach(), exact(kind, x.detach())), kind


@thread_ranks(2, 3, 8)
@pytest.mark.parametrize(("forward", "backward"), [("int8", "int4"), ("spike5", "bf16"), ("fp8_e4m3", "spike3")])
def test_each_direction_is_within_the_bound_of_its_format(forward, backward):
    """Inputs whose magnitudes differ by 1000 between ranks, with one outlier; sums are compared in float64."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for kind, call in CALLS.items():
        x = torch.randn(world_size, 257, generator=rank_generator(5)) * 1000.0 ** (rank % 2)
        x[0, 3] = 1e5
        x.requires_grad_()
        weight_of = rank_generator(6)
        if kind in ("replicate", "shard"):
            with torch.no_grad():
                dist.broadcast(x, 0)
            y = call(x, 0, format=backward)
        else:
            y = call(x, 0, format=forward, backward=backward)
            assert_within(kind, y.detach(), x.detach(), forward)
        weight = torch.randn(y.shape, generator=weight_of)
        (y * weight).sum().backward()
        assert_within(ADJOINT[kind], x.grad, weight, backward)


def assert_within(kind, found, x, name):
    fmt = commq.get_format(name)
    rows = x.dim() > 1 and kind in ("reduce_scatter", "all_to_all")
    parts = x.chunk(dist.get_world_size()) if rows else [x]
    bound = torch.cat([error_bound(part.reshape(-1), fmt) for part in parts]).view_as(x)
    total, allowed = exact(kind, x.to(torch.float64)), exact(kind, bound)
    if kind in ("all_reduce", "reduce_scatter"):
        allowed = allowed + total.abs() * 2.0**-20 + sum(gather(x.abs().to(torch.float64))).amax() * 2.0**-20
    if kind == "all_reduce":  # the second hop encodes the sum, which the first has moved
        rough = (total.abs() + allowed).reshape(-1).to(torch.float32)
        again = error_bound(rough, fmt)
        if fmt.kind == "spikes":  # other elements may be kept in the moved sum
            padded = torch.nn.functional.pad(again, (0, -len(again) % fmt.block)).view(-1, fmt.block)
            again = padded.amax(dim=-1).repeat_interleave(fmt.block)[: len(again)]
        allowed = allowed + again.view_as(total) * (1 + 2.0**-20)
    assert bool(((found.to(torch.float64) - total).abs() <= allowed).all()), kind


@thread_ranks(3)
def test_replicated_results_send_nothing_backward():
    x = whole_numbers((3, 4), 7).requires_grad_()
    before = F.traffic().get("all_reduce", F.Traffic()).backward_calls
    F.all_reduce(x, format="fp32", replicated=True).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4))
    x.grad = None
    F.all_reduce(x, dist.ReduceOp.AVG, format="fp32", replicated=True).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4) / 3)
    x.grad = None
    F.all_gather(x, format="fp32", replicated=True).cumsum(0).sum().backward()
    assert x.grad[:, 0].tolist() == [9 - 3 * dist.get_rank() - i for i in range(3)]
    assert F.traffic()["all_reduce"].backward_calls == before


@thread_ranks(3)
def test_averages():
    x = torch.ones(6, 50).requires_grad_()
    y = F.all_reduce(x, dist.ReduceOp.AVG, format="int4")
    z = F.reduce_scatter(y, dist.ReduceOp.AVG, format="int4")
    z.sum().backward()
    assert bool((z == 1.0).all()) and bool((x.grad == torch.ones(()) / 3).all())


@thread_ranks(1, 2, 3, 5, 8)
def test_uneven_and_empty_splits():
    """Rank a sends (7 a + 5 b) % 9 * 40 rows to rank b; what comes back is what was sent."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = [[(7 * a + 5 * b) % 9 * 40 for b in range(world_size)] for a in range(world_size)]
    sent, received = rows[rank], [rows[a][rank] for a in range(world_size)]
    x = torch.cat([torch.full((n, 3), 1.0 + rank + 16 * b) for b, n in enumerate(sent)]).requires_grad_()
    y = F.all_to_all(x, received, sent, format="int8", backward="int4")
    for a, part in enumerate(y.split(received)):
        assert bool((part == 1.0 + a + 16 * rank).all())
    y.backward(y.detach())
    assert torch.equal(x.grad, x.detach())
    with pytest.raises(ValueError, match="expected both or neither"):
        F.all_to_all(x, received, format="int8")
    with pytest.raises(ValueError, match="lengths of 0 or more along dimension 0"):
        F.all_to_all(x, [-1] * world_size, sent, format="int8")
    with pytest.raises(ValueError, match="a tensor with 0 dimensions"):
        F.all_to_all(torch.ones(()), format="int8")


def mixed(x, weight, step, rounding="stochastic"):
    """All exchanges that torch.compile takes, one after the other."""
    options = {"rounding": rounding, "seed": 5, "step": step}
    h = F.replicate(x, format="int8", **options) @ weight
    h = F.all_reduce(h.relu(), format=INT4, backward="int8", **options)
    h = F.all_gather(h, dim=1, format="int8", backward="bf16", **options)
    h = F.reduce_scatter(h, dim=1, format="int4", rotation=32, **options)
    h = F.all_to_all(h.flatten(0, 1), format="int8", **options).view_as(h)
    return F.shard(h, dim=2, format="int8", **options).square().sum()


def gradient_of(function, step, *, dtype=torch.float32):
    world_size = dist.get_world_size()
    x = torch.randn(2, world_size * 4, world_size * 16, generator=rank_generator(8)).to(dtype).requires_grad_()
    weight = torch.randn(world_size * 16, world_size * 16, generator=torch.Generator().manual_seed(9)).to(dtype)
    function(x, weight, step).backward()
    return x.grad


@thread_ranks(2, 3, 4)
def test_checkpointed_layers_send_the_same_bytes_again():
    plain = [gradient_of(mixed, step) for step in (0, 1)]

    def recomputed(*inputs):
        return checkpoint(mixed, *inputs, use_reentrant=False)

    again = [gradient_of(recomputed, step) for step in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not torch.equal(*plain)  # the step does count


@thread_ranks(2)
def test_selective_checkpointing_may_keep_what_was_received():
    def keep(context, op, *args, **kwargs):
        ours = op.namespace == "commq"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def kept(*inputs):
        contexts = partial(create_selective_checkpoint_contexts, keep)
        return checkpoint(mixed, *inputs, use_reentrant=False, context_fn=contexts)

    expected = gradient_of(mixed, 3)
    calls = F.traffic()["all_reduce"].forward_calls
    assert torch.equal(gradient_of(kept, 3), expected)
    assert F.traffic()["all_reduce"].forward_calls == calls + 1


def test_two_runs_have_the_same_bits():
    runs = [run_threads(gradient_of, 3, args=(mixed, 4), kwargs={"dtype": torch.bfloat16}) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def through_a_pipeline(x, rank):
    if rank == 0:
        return F.send(x * 2, 1, format="int8", backward="int4")
    like = torch.empty(40, 30, dtype=torch.bfloat16, requires_grad=True)
    y = F.recv(like, 0, format="int8", backward="int4")
    return (y * 3).sum(), y


@process_ranks(2)
def test_send_recv_and_torch_compile():
    """All but send and recv are one graph, forward and backward, with eager's bits; those two run outside of graphs."""
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 2):
        assert torch.equal(gradient_of(mixed, step), gradient_of(compiled, step))
    plan = {"0": ColwiseParallel(format="int8"), "2": RowwiseParallel(format="int8")}
    mlp = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    parallelize_module(mlp, init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(4, 32)
    assert torch.equal(mlp(x), torch.compile(mlp, fullgraph=True, backend="aot_eager")(x))
    rank = dist.get_rank()
    x = torch.full((40, 30), 1.5, dtype=torch.bfloat16, requires_grad=True)
    for function in (through_a_pipeline, torch.compile(through_a_pipeline, backend="eager")):
        x.grad = None
        if rank == 0:
            function(x, rank).backward()
            assert bool((x.grad == 6.0).all())
        else:
            loss, y = function(x, rank)
            assert bool((y == 3.0).all())
            loss.backward()
    counts = F.traffic()["send" if rank == 0 else "recv"]
    assert (counts.forward_calls, counts.backward_calls) == ((2, 0) if rank == 0 else (0, 2))


def die_before_backward():
    lost.PATIENCE = timedelta(seconds=1)
    x = torch.ones(1000, requires_grad=True)
    y = F.all_reduce(x, format="int8")
    if dist.get_rank() == 2:
        os._exit(9)
    y.sum().backward()


def test_a_rank_that_dies_is_named_in_backward():
    with pytest.raises(RankError) as caught:
        run_processes(die_before_backward, 3)
    said = str(caught.value)
    assert "RankLostError: rank 0 of 3: all_" in said and "RankLostError: rank 1 of 3: all_" in said
    assert said.count("rank 2 has not been heard of for 1 s") >= 2


@thread_ranks(2, 3, 4)
def test_bytes_are_counted_by_name_and_direction():
    world_size = dist.get_world_size()
    x = torch.randn(world_size * 256, 64, dtype=torch.bfloat16).requires_grad_()
    F.all_reduce(x, format="int8", backward="bf16", name="mlp").sum().backward()
    found = F.traffic()["mlp"]
    payload = 2 * (world_size - 1) * 256 * 64  # elements in two hops
    assert found.forward_bytes == payload + payload // 128 * 4
    assert found.backward_bytes == found.forward_raw_bytes == found.backward_raw_bytes == 2 * payload
    assert (found.forward_calls, found.backward_calls) == (1, 1)


@thread_ranks(2)
def test_wrong_arguments_are_refused_before_anything_is_sent():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"3 elements along dimension 0 of .*multiple of 2"):
        F.reduce_scatter(x, format="int8")
    with pytest.raises(ValueError, match="3 elements along dimension 0"):
        F.shard(x, format="int8")
    with pytest.raises(ValueError, match="dim=2 of a tensor with 2 dimensions"):
        F.all_gather(x, dim=2, format="int8")
    with pytest.raises(ValueError, match=r"expected ReduceOp\.SUM or ReduceOp\.AVG"):
        F.all_reduce(x, dist.ReduceOp.MAX, format="int8")
    with pytest.raises(ValueError, match="format 'int9' is unknown"):
        F.all_reduce(x, format="int8", backward="int9")
    with pytest.raises(ValueError, match="rounds in float32"):
        F.all_reduce(x, format="int8", backward="fp16", rounding="stochastic")
    with pytest.raises(TypeError, match="expected a ProcessGroup or a DeviceMesh"):
        F.all_reduce(x, format="int8", group=3)
    with pytest.raises(TypeError, match="float64"):
        F.all_reduce(x.double(), format="int8")
    assert not F.traffic()


def test_public_names():
    assert F.__all__ == sorted(F.__all__)
    assert commq.functional is F
