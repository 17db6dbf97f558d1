"""Schedules: what is true of every way to travel, and what each adds."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS, get_format
from commq.collectives import all_reduce as api
from commq.collectives.all_reduce import answer_residual_numel
from commq.collectives.plan import Source, make_plans
from harness import process_ranks, rank_generator, thread_ranks

two_shot = partial(commq.all_reduce, schedule="two_shot")
SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return rows


@thread_ranks(1, 2, 3, 8)
@pytest.mark.parametrize("schedule", ["one_shot", "plain"])
def test_ones_average_to_exactly_one(schedule):
    for name in FORMATS:
        for numel in (1, 127, 129, 10_003):
            tensor = torch.ones(numel)
            commq.all_reduce(tensor, AVG, format=name, schedule=schedule)
            assert bool((tensor == 1.0).all()), (name, numel)


@thread_ranks(2, 3, 5, 17)
def test_one_shot_is_within_the_bound_of_one_encoding():
    for name, fmt in FORMATS.items():
        x = torch.randn(1003, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
        inputs = torch.stack(gather(x))
        result = x.clone()
        commq.all_reduce(result, AVG, format=name, schedule="one_shot")
        exact = inputs.to(torch.float64).mean(dim=0)
        bound = torch.stack([error_bound(row, fmt) for row in inputs]).mean(dim=0)
        assert bool(((result - exact).abs() <= bound + 2.0**-22 * inputs.abs().sum(dim=0)).all()), name
        assert all(torch.equal(row, result) for row in gather(result)), name


@thread_ranks(2, 3)
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int4"},
        {"format": "sign", "answer": "int8"},
        {"format": "int4", "rounding": "stochastic", "seed": 3, "step": 7},
        {"format": "int4", "rotation": 64, "rounding": "stochastic"},
        {"format": "bf16", "rounding": "stochastic"},
        {"format": "nvfp4", "answer": "bf16"},
    ],
    ids=str,
)
def test_pieces_change_no_bit(options):
    x = torch.randn(70_001, generator=rank_generator(2))
    whole, cut = x.clone(), x.clone()
    two_shot(whole, AVG, **options)
    with piece_bytes(1 << 14):
        two_shot(cut, AVG, **options)
    assert torch.equal(whole, cut)


class piece_bytes:  # noqa: N801
    """Cut messages in pieces of this many bytes. Ranks that are threads share the setting, so they meet around it."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __enter__(self):
        dist.barrier()
        if dist.get_rank() == 0:
            self.before = dict(api.PIECE_BYTES)
            api.PIECE_BYTES["cpu"] = self.nbytes
        dist.barrier()

    def __exit__(self, *_):
        dist.barrier()
        if dist.get_rank() == 0:
            api.PIECE_BYTES.update(self.before)
        dist.barrier()


@thread_ranks(3)
def test_a_list_has_the_bits_of_its_tensors_alone():
    xs = [torch.randn(n, generator=rank_generator(n)) for n in (5000, 1, 300, 70_001)]
    xs[1] = xs[1].to(torch.bfloat16)
    together, alone = [x.clone() for x in xs], [x.clone() for x in xs]
    two_shot(together, AVG, format="int8")
    for tensor in alone:
        two_shot(tensor, AVG, format="int8")
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    commq.all_reduce([], format="int8")


@thread_ranks(2, 3)
def test_feedback_on_both_hops_loses_nothing():
    """Over all steps: sum of inputs == sum of outputs + residuals (classic), up to fp32 rounding of each step."""
    numel, world_size, rank = 5000, dist.get_world_size(), dist.get_rank()
    options = {"format": "sign", "answer": "sign"}
    with piece_bytes(1 << 13):
        own = torch.zeros(numel)
        answer = torch.zeros(answer_residual_numel(numel, world_size=world_size, **options))
        total_in, total_out = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
        for _ in range(5):
            x = torch.randn(numel, generator=rank_generator(4))
            total_in += torch.stack(gather(x)).to(torch.float64).mean(dim=0)
            two_shot(x, AVG, residual=own, answer_residual=answer, **options)
            total_out += x
        lost = torch.stack(gather(own)).to(torch.float64).mean(dim=0)
        # The owner's part of each piece, in order of the pieces; padding at a piece's end belongs to nobody.
        rows, second = gather(answer), torch.zeros(numel, dtype=torch.float64)
        first = at = 0
        sources = (Source(numel, torch.float32, get_format("sign"), get_format("sign")),)
        for plan in make_plans(sources, world_size=world_size, piece_bytes=1 << 13):
            (part,) = plan.parts
            chunk = part.answer.chunk_numel
            for owner, row in enumerate(rows):
                begin = first + owner * chunk
                valid = part.answer.valid(owner)
                second[begin : begin + valid] = row[at : at + valid]
            first, at = first + part.numel, at + chunk
    scale = 2.0**-22 * 5 * (total_in.abs().max() + lost.abs().max() + second.abs().max())
    assert float((total_in - total_out - lost - second).abs().max()) <= float(scale)
    assert float(second.abs().max()) > 0 and rank < world_size


@process_ranks(2)
def test_async_in_pieces_of_lists_and_futures():
    api.PIECE_BYTES["cpu"] = 1 << 14
    xs = [torch.full((30_000,), float(dist.get_rank() + i)) for i in range(3)]
    first = two_shot(xs[:2], AVG, format="int8", async_op=True)
    second = commq.all_reduce(xs[2], AVG, format="int4", schedule="one_shot", async_op=True)
    assert not first.is_completed()
    assert [bool((x == i + 0.5).all()) for i, x in enumerate(first.get_future().wait())] == [True, True]
    assert second.wait() and second.is_completed() and bool((xs[2] == 2.5).all())
    assert second.get_future().wait()[0] is xs[2]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: commq.all_reduce(t, format="int8", schedule="tree"), ValueError, "'tree' is unknown"),
        (lambda t: commq.all_reduce(t, format="int8", group="world"), TypeError, "expected a ProcessGroup"),
        (lambda t: commq.all_reduce([t, t], format="int8", residual=t), ValueError, "not with a list"),
        (lambda t: commq.all_reduce(t, format="int8", residual=t[:2]), ValueError, "of the tensor's 4"),
        (
            lambda t: commq.all_reduce(t, format="int8", answer_residual=t, schedule="plain"),
            ValueError,
            "expected two_shot or two_hop, by name",
        ),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.ones(4))
