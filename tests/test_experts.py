"""Experts on several ranks: the plain layer's results and gradients, exactly or within the bound of the formats."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import commq
import commq.functional as F
from commq.attach.experts import Experts
from commq.codecs.bounds import error_bound
from harness import rank_generator, thread_ranks
from test_functional import whole_numbers

LOCAL = 2
"""Experts of a rank."""


def weights(width, out, seed, *, whole):
    """Of the experts of all ranks, the same on every rank: (E, out, width)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LOCAL * dist.get_world_size(), out, width)
    if whole:
        return torch.randint(-3, 4, shape, generator=generator).to(torch.float32)
    return torch.randn(shape, generator=generator)


def make(weight_EOD, **options):
    own = weight_EOD.chunk(dist.get_world_size())[dist.get_rank()]
    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in own]
    with torch.no_grad():
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.copy_(weight)
    return Experts(layers, **options)


def plain(x_TD, choice_TK, weight_TK, weight_EOD):
    results = torch.einsum("tkod,td->tko", weight_EOD[choice_TK], x_TD)
    return (results * weight_TK[..., None]).sum(dim=1)


def routing(kind, tokens, choices):
    """Choices (T, K) of this rank; T differs between ranks, and is 0 on some."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total, generator = LOCAL * world_size, rank_generator(11)
    if kind == "random":
        return torch.randint(0, total, (tokens, choices), generator=generator)
    if kind == "all to one":
        return torch.full((tokens, choices), total - 1)
    if kind == "one rank has none":
        return torch.randint(0, total, (0 if rank == world_size - 1 else tokens, choices), generator=generator)
    assert kind == "nobody has any"
    return torch.empty(0, choices, dtype=torch.int64)


KINDS = ["random", "all to one", "one rank has none", "nobody has any"]


@thread_ranks(1, 2, 3, 4, 8)
@pytest.mark.parametrize("kind", KINDS)
def test_raw_formats_are_the_plain_layer(kind):
    """Whole numbers, so that sums are exact in any order; expert gradients are summed over the ranks' tokens."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    choice = routing(kind, 5 + 3 * rank, 2)
    x, mix = whole_numbers((len(choice), 6), 1), whole_numbers(choice.shape, 2)
    table = weights(6, 4, 3, whole=True)
    layer = make(table, dispatch="fp32", combine="fp32")
    inputs = [each.clone().requires_grad_() for each in (x, mix)]
    others = [each.clone().requires_grad_() for each in (x, mix)]
    table.requires_grad_()
    y, expected = layer(inputs[0], choice, inputs[1]), plain(others[0], choice, others[1], table)
    assert torch.equal(y, expected)
    seed = whole_numbers(y.shape, 4)
    (y * seed).sum().backward()
    (expected * seed).sum().backward()
    for a, b in zip(inputs, others, strict=True):
        assert torch.equal(a.grad, b.grad)
    total = table.grad.clone()
    dist.all_reduce(total)
    own = torch.stack([expert.weight.grad for expert in layer.experts])
    assert torch.equal(own, total.chunk(world_size)[rank])


def bound_of_splits(x, choice, fmt):
    """The bound for each row of x that travels; rows are sorted by expert, and blocks start anew with each split."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    counts = torch.bincount(choice.flatten(), minlength=LOCAL * world_size).view(world_size, -1).sum(1).tolist()
    bounds = [
        torch.zeros(split.shape, dtype=torch.float64)
        if to == rank
        else error_bound(split.reshape(-1), fmt).view(split.shape)
        for to, split in enumerate(x.float().split(counts))
    ]
    return torch.cat(bounds)


def sums_of(magnitudes):
    """Rounding of float32 sums of up to 64 products with these sums of magnitudes, and a little more."""
    return magnitudes * 66 * 2.0**-24


@thread_ranks(2, 3, 4)
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("dispatch", ["int8", "spike4"])
def test_within_the_bounds_of_dispatch_and_combine(kind, dispatch):
    """One expert a token with weight 1: |y - plain| <= |weight| @ dispatch bound + combine bound, and so backward."""
    choice = routing(kind, 40, 1)
    width, out = 64, 48
    x = torch.randn(len(choice), width, generator=rank_generator(5))
    x[:, 3] *= 100.0
    x.requires_grad_()
    table = weights(width, out, 6, whole=False)
    layer = make(table, dispatch=dispatch, combine="bf16", dispatch_gradient="bf16", combine_gradient="int8")
    y = layer(x, choice, torch.ones(choice.shape))
    order = choice.flatten().argsort(stable=True)
    chosen = table[choice[order, 0]].double()
    exact = torch.einsum("tod,td->to", chosen, x.detach()[order].double())
    moved = torch.einsum(
        "tod,td->to", chosen.abs(), bound_of_splits(x.detach()[order], choice, commq.get_format(dispatch))
    )
    rounding = sums_of(torch.einsum("tod,td->to", chosen.abs(), x.detach()[order].double().abs()) + moved)
    allowed = bound_of_splits(exact.abs() + moved, choice, commq.get_format("bf16")) + moved + rounding
    assert bool(((y.detach()[order].double() - exact).abs() <= allowed).all())

    seed = torch.randn(y.shape, generator=rank_generator(7))
    (y * seed).sum().backward()
    exact = torch.einsum("tod,to->td", chosen, seed[order].double())
    moved = torch.einsum("tod,to->td", chosen.abs(), bound_of_splits(seed[order], choice, commq.get_format("int8")))
    rounding = sums_of(torch.einsum("tod,to->td", chosen.abs(), seed[order].double().abs()) + moved)
    allowed = bound_of_splits(exact.abs() + moved, choice, commq.get_format("bf16")) + moved + rounding
    assert bool(((x.grad[order].double() - exact).abs() <= allowed).all())


@thread_ranks(2, 4)
def test_dispatch_takes_at_most_52_percent_of_bf16_s_bytes():
    choice = routing("random", 300, 2)
    x = torch.randn(len(choice), 256, generator=rank_generator(8)).to(torch.bfloat16).requires_grad_()
    layer = make(weights(256, 256, 9, whole=False)).to(torch.bfloat16)
    layer(x, choice, torch.full(choice.shape, 0.5)).sum().backward()
    dispatch, combine = F.traffic()["experts.dispatch"], F.traffic()["experts.combine"]
    others = int((choice // LOCAL != dist.get_rank()).sum())
    assert dispatch.forward_raw_bytes == others * 256 * 2
    assert dispatch.forward_bytes <= 0.52 * dispatch.forward_raw_bytes
    assert dispatch.backward_bytes <= 0.52 * dispatch.backward_raw_bytes
    assert combine.forward_bytes == combine.forward_raw_bytes == dispatch.backward_raw_bytes


@thread_ranks(3)
def test_two_runs_and_recomputation_have_the_same_bits():
    choice = routing("random", 50, 2)
    x = torch.randn(len(choice), 64, generator=rank_generator(8))
    mix = torch.rand(choice.shape, generator=rank_generator(9))
    layer = make(weights(64, 64, 9, whole=False))
    found = []
    for call in (layer, layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)):
        layer.zero_grad()
        here = x.clone().requires_grad_()
        y = call(here, choice, mix)
        y.square().sum().backward()
        found.append((y.detach(), here.grad, *(each.grad.clone() for each in layer.parameters())))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@thread_ranks(2)
def test_wrong_choices_and_formats_are_refused():
    layer = make(weights(4, 4, 1, whole=True))
    with pytest.raises(ValueError, match="a token for expert 4, expected 0 to 3: 2 on each of 2 ranks"):
        layer(torch.ones(1, 4), torch.tensor([[4]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="a token for expert -1, expected 0 to 3"):
        layer(torch.ones(2, 4), torch.tensor([[0], [-1]]), torch.ones(2, 1))
    for choice, weight in (([[0], [0]], (2, 1)), ([0], (1,)), ([[0]], (1, 2))):
        with pytest.raises(ValueError, match=r"expected \(T, D\), \(T, K\) and \(T, K\)"):
            layer(torch.ones(1, 4), torch.tensor(choice), torch.ones(weight))
    with pytest.raises(ValueError, match="format 'int9' is unknown"):
        Experts([nn.Identity()], combine="int9")
    with pytest.raises(ValueError, match="no experts"):
        Experts([])
