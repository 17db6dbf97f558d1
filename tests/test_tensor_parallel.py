"""Styles for parallelize_module: the plain module's values and gradients, exactly or within the bound of the format."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import commq.functional as F
from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, localize
from harness import thread_ranks
from test_functional import assert_within

WORLD_SIZES = (1, 2, 3, 4, 8)


def whole(shape, seed):
    """The same whole numbers on every rank: sums of products of them are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def normal(shape, seed):
    """The same on every rank; threads share torch's own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_whole_numbers(module):
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(whole(parameter.shape, number))
    return module


def make(module, style):
    """The plain module and the parallel one, with the same parameters."""
    plain = with_whole_numbers(module)
    plain.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return plain, parallelize_module(copy.deepcopy(plain), mesh, style), mesh


def part(x, dim):
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def check(module, style, x, *, split_in=None, split_out=None, split_parameters):
    """Values and all gradients equal those of the plain module; split_...: the dimension that ranks have parts of."""
    plain, parallel, _ = make(module, style)
    x = x.clone()
    here = (x if split_in is None else part(x, split_in)).clone()
    if x.is_floating_point():
        x.requires_grad_()
        here.requires_grad_()
    expected, found = plain(x), parallel(here)
    assert torch.equal(found, expected if split_out is None else part(expected, split_out))
    weight = whole(expected.shape, 99)
    (expected * weight).sum().backward()
    (found * (weight if split_out is None else part(weight, split_out))).sum().backward()
    if x.is_floating_point():
        assert torch.equal(here.grad, x.grad if split_in is None else part(x.grad, split_in))
    for name, parameter in plain.named_parameters():
        other, dim = parallel.get_parameter(name), split_parameters[name]
        assert isinstance(other, DTensor) and isinstance(other.grad, DTensor)
        assert other.placements == other.grad.placements == ((Replicate() if dim is None else Shard(dim)),)
        assert torch.equal(other.grad.to_local(), parameter.grad if dim is None else part(parameter.grad, dim)), name


@thread_ranks(*WORLD_SIZES)
def test_colwise_linear_is_the_plain_one():
    world_size = dist.get_world_size()
    x, split = whole((2, 2 * world_size, 5), 1), {"weight": 0, "bias": 0}
    linear = nn.Linear(5, 3 * world_size)
    check(linear, ColwiseParallel(format="fp32"), x, split_out=-1, split_parameters=split)
    style = ColwiseParallel(input_layouts=Shard(1), format="fp32")
    check(linear, style, x, split_in=1, split_out=-1, split_parameters=split)
    check(linear, ColwiseParallel(output_layouts=Replicate(), format="fp32"), x, split_parameters=split)


@thread_ranks(*WORLD_SIZES)
def test_rowwise_linear_is_the_plain_one():
    world_size = dist.get_world_size()
    x, split = whole((2, 2 * world_size, 3 * world_size), 1), {"weight": 1, "bias": None}
    linear = nn.Linear(3 * world_size, 5)
    check(linear, RowwiseParallel(format="fp32"), x, split_in=-1, split_parameters=split)
    check(linear, RowwiseParallel(input_layouts=Replicate(), format="fp32"), x, split_parameters=split)
    style = RowwiseParallel(output_layouts=Shard(1), format="fp32")
    check(linear, style, x, split_in=-1, split_out=1, split_parameters=split)


@thread_ranks(1, 2, 3)
def test_embeddings_are_the_plain_ones():
    world_size = dist.get_world_size()
    index = torch.randint(0, 4 * world_size, (3, 2 * world_size), generator=torch.Generator().manual_seed(3))
    for padding in (None, 4 * world_size - 1):
        embedding = nn.Embedding(4 * world_size, 2 * world_size, padding_idx=padding)
        check(embedding, ColwiseParallel(format="fp32"), index, split_out=-1, split_parameters={"weight": 1})
        style = RowwiseParallel(input_layouts=Replicate(), format="fp32")
        check(embedding, style, index, split_parameters={"weight": 0})
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), format="fp32")
        check(embedding, style, index, split_out=1, split_parameters={"weight": 0})


@thread_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_sequence_parallel_norms_sum_the_gradients_of_their_parameters(kind):
    """Of inputs whose norm is exact: 1 and -1 in equal numbers."""
    world_size = dist.get_world_size()
    x = torch.ones(2, 3 * world_size, 4)
    x[..., ::2] = -1.0
    norm = kind(4, eps=0.0)
    split = dict.fromkeys(dict(norm.named_parameters()))
    check(norm, SequenceParallel(), x, split_in=1, split_out=1, split_parameters=split)


def mlp(format, gradient, *, sequence=False):
    layouts = {"input_layouts": Shard(1)} if sequence else {}
    return {
        "0": ColwiseParallel(format=format, gradient=gradient, name="up", **layouts),
        "2": RowwiseParallel(
            format=format, gradient=gradient, name="down", output_layouts=Shard(1) if sequence else Replicate()
        ),
    }


@thread_ranks(2, 3, 4, 8)
@pytest.mark.parametrize(("format", "gradient"), [("int8", "int8"), ("spike5", "int8"), ("spike3", "spike4")])
def test_an_mlp_is_within_the_bound_of_its_formats(format, gradient):
    """Values against the partial sums, the input's gradient against its parts; with planted outlier channels."""
    world_size = dist.get_world_size()
    plain = nn.Sequential(nn.Linear(128, 48 * world_size), nn.GELU(), nn.Linear(48 * world_size, 128))
    with torch.no_grad():
        for number, parameter in enumerate(plain.parameters()):
            parameter.copy_(normal(parameter.shape, number) / 10)
    mesh = init_device_mesh("cpu", (world_size,))
    parallel = parallelize_module(copy.deepcopy(plain), mesh, mlp(format, gradient))
    x = normal((4, 6, 128), 5)
    x[..., [3, 77]] *= 100.0
    here, whole_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, weight = parallel(here), normal((4, 6, 128), 6)
    hidden = torch.nn.functional.linear(whole_x, part(plain[0].weight, 0), part(plain[0].bias, 0))
    partial = torch.nn.functional.linear(plain[1](hidden), part(plain[2].weight, 1))
    assert_within("all_reduce", (y - plain[2].bias).detach(), partial.detach(), format)
    (y * weight).sum().backward()
    (partial * weight).sum().backward()
    assert_within("all_reduce", here.grad, whole_x.grad, gradient)
    # All ranks hold the same bits, without having exchanged the bias or its gradient.
    for same in (y.detach(), here.grad, parallel[2].bias.grad.to_local()):
        everyone = [torch.empty_like(same) for _ in range(world_size)]
        dist.all_gather(everyone, same)
        assert all(torch.equal(each, same) for each in everyone)


@thread_ranks(2, 4)
def test_bytes_of_an_mlp_are_counted():
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    for sequence in (False, True):
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.GELU(), nn.Linear(512, 256, bias=False))
        parallelize_module(model.to(torch.bfloat16), mesh, mlp("int8", None, sequence=sequence))
        x = torch.randn(2, 64 // (world_size if sequence else 1), 256).to(torch.bfloat16).requires_grad_()
        before = {name: copy.copy(each) for name, each in F.traffic(mesh).items()}
        model(x).sum().backward()
        for name, forward in (("up", sequence), ("down", True)):
            found, old = F.traffic(mesh)[name], before.get(name, F.Traffic())
            sent = found.forward_bytes - old.forward_bytes
            raw = found.forward_raw_bytes - old.forward_raw_bytes
            assert (sent > 0) == forward and (not forward or sent <= 0.52 * raw)
            sent = found.backward_bytes - old.backward_bytes
            assert (sent > 0) == (name == "up" or sequence)


def gradients(module, call):
    """Of the parameters, whole."""
    module.zero_grad()
    call(normal((4, 24), 7)).square().sum().backward()
    return [parameter.grad.full_tensor() for parameter in module.parameters()]


@thread_ranks(4)
def test_fsdp_and_checkpointing_on_top():
    """A mesh of 2 x 2: FSDP2 over the outer dimension, of ranks with the same data, changes no gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plain = with_whole_numbers(nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 24)))
    parallel = parallelize_module(copy.deepcopy(plain), mesh["tensor"], mlp("int8", "int4"))
    sharded = parallelize_module(copy.deepcopy(plain), mesh["tensor"], mlp("int8", "int4"))
    fully_shard(sharded, mesh=mesh["data"])
    expected = gradients(parallel, parallel)
    recomputed = gradients(parallel, lambda x: checkpoint(parallel, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(expected, recomputed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(sharded, sharded), strict=True))


@thread_ranks(2)
def test_a_copy_is_a_module_of_its_own():
    _, parallel, _ = make(nn.Linear(4, 6), ColwiseParallel(format="int8"))
    other = copy.deepcopy(parallel)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    assert bool((other(torch.ones(2, 4)) == 0).all()) and bool((parallel(torch.ones(2, 4)) != 0).any())


@thread_ranks(2)
def test_dtensors_in_and_out():
    plain, parallel, mesh = make(nn.Linear(6, 4), RowwiseParallel(use_local_output=False, format="fp32"))
    x = whole((3, 6), 5)
    y = parallel(DTensor.from_local(part(x, -1), mesh, [Shard(1)]))
    assert y.placements == (Replicate(),) and torch.equal(y.to_local(), plain(x))
    with pytest.raises(ValueError, match=r"placements \(Replicate\(\),\), expected S\(-1\)|expected Shard"):
        parallel(DTensor.from_local(x, mesh, [Replicate()]))


@thread_ranks(2)
def test_local_parts_for_ddp():
    plain, parallel, _ = make(nn.Linear(4, 6), ColwiseParallel(format="fp32"))
    localize(parallel)
    assert not any(isinstance(each, DTensor) for each in parallel.parameters())
    assert torch.equal(parallel(torch.ones(2, 4)), part(plain(torch.ones(2, 4)), -1))


@thread_ranks(2)
def test_what_cannot_be_is_refused():
    mesh = init_device_mesh("cpu", (2,))
    for style, module, error, message in (
        (ColwiseParallel(format="int8"), nn.Linear(4, 5), ValueError, "5 elements along dimension 0 of weight"),
        (RowwiseParallel(format="int8"), nn.Linear(5, 4), ValueError, "5 elements along dimension 1 of weight"),
        (ColwiseParallel(format="int8"), nn.GELU(), TypeError, "a GELU, expected one of Linear, Embedding"),
        (SequenceParallel(), nn.BatchNorm1d(4), TypeError, "expected one of LayerNorm, RMSNorm"),
        (ColwiseParallel(format="int8", output_layouts=Shard(0)), nn.Linear(4, 4), ValueError, "output_layouts=S"),
        (ColwiseParallel(format="int8", input_layouts=Shard(1)), nn.Embedding(4, 4), ValueError, "of a Embedding"),
        (RowwiseParallel(format="int8"), nn.Embedding(4, 4), ValueError, "input_layouts=S"),
        (
            RowwiseParallel(format="int8", input_layouts=Replicate()),
            nn.Embedding(4, 4, max_norm=1.0),
            ValueError,
            "max_norm",
        ),
    ):
        with pytest.raises(error, match=message):
            parallelize_module(module, mesh, style)
    with pytest.raises(ValueError, match="format 'int9' is unknown"):
        RowwiseParallel(format="int9")
    assert "format=int8, gradient=int8" in repr(ColwiseParallel(format="int8"))
