"""The two-shot all-reduce on thread ranks: exact on constants, equal on all ranks, within its bound, deterministic."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS
from commq.collectives.transport import C10d, check_equal
from harness import process_ranks, rank_generator, run_processes, run_threads, thread_ranks
from numerics import paired

all_reduce = partial(commq.all_reduce, schedule="two_shot")
SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
ALL_RANKS = range(1, 18)


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return rows


@thread_ranks(*ALL_RANKS)
def test_ones_average_to_exactly_one():
    for name, numel in paired(FORMATS, (1, 127, 128, 100_003), dist.get_world_size()):
        tensor = torch.ones(numel)
        all_reduce(tensor, AVG, format=name)
        assert bool((tensor == 1.0).all()), (name, numel)


@thread_ranks(*ALL_RANKS)
def test_ones_sum_to_exactly_the_world_size():
    world_size = dist.get_world_size()
    for name in FORMATS:
        tensor = torch.ones(1003)
        all_reduce(tensor, format=name)
        # A power-of-two scale and a mantissa of m bits cannot say every integer; those formats are within their bound.
        bound = (
            0.0 if not name.startswith("mx") else float(error_bound(torch.full((1,), float(world_size)), FORMATS[name]))
        )
        assert bool(((tensor - world_size).abs() <= bound).all()), name


@thread_ranks(2, 3, 5, 17)
def test_within_the_bound_and_equal_on_all_ranks():
    """|result - exact mean| <= mean of the ranks' bounds + the bound of the answer."""
    for name, fmt in FORMATS.items():
        # Ranks whose magnitudes differ by 1000, one huge element, a length that is a multiple of nothing.
        x = torch.randn(1003, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
        x[501] *= 100
        inputs = torch.stack(gather(x))
        result = x.clone()
        all_reduce(result, AVG, format=name)
        exact = inputs.to(torch.float64).mean(dim=0)
        first = torch.stack([error_bound(row, fmt) for row in inputs]).mean(dim=0)
        # The owner's mean lies within `first` of the exact one, and is what the second hop rounds.
        second = error_bound((exact.abs() + first).to(torch.float32), fmt)
        rounding = 2.0**-22 * inputs.abs().sum(dim=0)
        assert bool(((result - exact).abs() <= first + second + rounding).all()), name
        assert all(torch.equal(row, result) for row in gather(result)), name


@thread_ranks(2)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_padding_of_the_last_block_is_no_part_of_its_mean(backend):
    """Padding decodes to a sign, too: here to 0.25 a piece, while the two elements' mean is 0.125."""
    tensor = torch.full((130,), 0.375 if dist.get_rank() == 0 else -0.125)
    all_reduce(tensor, AVG, format="sign", backend=backend)
    assert bool((tensor == 0.125).all())


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_and_strides(dtype):
    base = torch.full((6, 50), float(dist.get_rank() + 1), dtype=dtype)
    tensor = base.t()  # not contiguous
    all_reduce(tensor, format="int8")
    assert bool((base == 6.0).all())
    empty = torch.empty(0, dtype=dtype)
    all_reduce(empty, format="int8")
    scalar = torch.tensor(2.0, dtype=dtype)
    all_reduce(scalar, AVG, format="int4")
    assert float(scalar) == 2.0


@thread_ranks(3)
def test_not_finite_on_one_rank_is_nan_on_all():
    for value in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.ones(1000)
        if dist.get_rank() == 1:
            tensor[130] = value
        all_reduce(tensor, AVG, format="int4")
        assert bool(tensor[128:256].isnan().all())
        assert bool((tensor[:128] == 1).all()) and bool((tensor[256:] == 1).all())


@thread_ranks(4)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats():
    x = torch.randn(256, generator=rank_generator(2))
    exact = torch.stack(gather(x)).mean(dim=0)
    total = torch.zeros_like(x)
    steps = 120
    for step in range(steps):
        result = x.clone()
        all_reduce(result, AVG, format="int4", rounding="stochastic", step=step)
        total += result
        if step == 0:
            again = x.clone()
            all_reduce(again, AVG, format="int4", rounding="stochastic", step=step)
            assert torch.equal(again, result)
    # Each hop's rounding has a variance of at most step**2 / 4; the first hop's is averaged over 4 ranks.
    widest = max(float(row.abs().max()) for row in gather(x)) / 7
    deviation = (widest**2 / 4 / 4 + widest**2 / 4) ** 0.5 / steps**0.5
    assert float((total / steps - exact).abs().max()) < 5 * deviation


@thread_ranks(3)
def test_rotation_keeps_whole_runs_of_ones():
    tensor = torch.ones(96)
    all_reduce(tensor, AVG, format=commq.get_format("int4", block=16), rotation=32)
    assert bool((tensor == 1.0).all())


@thread_ranks(5)
def test_subgroup_and_other_answer_format():
    group = dist.new_group([1, 3, 4])
    rank = dist.get_rank()
    tensor = torch.full((500,), float(rank))
    if rank in (1, 3, 4):
        all_reduce(tensor, format="int4", answer="fp32", group=group)
    assert bool((tensor == (8.0 if rank in (1, 3, 4) else rank)).all())


def reduce_all_formats():
    results = []
    for name in FORMATS:
        tensor = torch.randn(1003, generator=rank_generator(3))
        all_reduce(tensor, AVG, format=name)
        results.append(tensor)
    return torch.stack(results)


def test_processes_give_the_same_bits_as_threads():
    for threads, processes in zip(
        run_threads(reduce_all_formats, 3), run_processes(reduce_all_formats, 3), strict=True
    ):
        assert torch.equal(threads, processes)


@process_ranks(2)
def test_async_op():
    tensors = [torch.full((1000,), float(i + dist.get_rank())) for i in range(3)]
    works = [all_reduce(t, AVG, format="int8", async_op=True) for t in tensors]
    for i, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
        work.wait()
        work.wait()  # a second wait changes nothing
        assert bool((tensor == i + 0.5).all())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: all_reduce(t, dist.ReduceOp.MAX, format="int8"), ValueError, "expected ReduceOp.SUM"),
        (lambda t: all_reduce(t.to(torch.int32), format="int8"), TypeError, "expected float32, bfloat16"),
        (lambda t: all_reduce(t[:1].expand(8), format="int8"), ValueError, "share memory"),
        (lambda t: all_reduce(t, format="int3"), ValueError, "'int3' is unknown"),
        (lambda t: all_reduce(t, format="fp32", rounding="stochastic"), ValueError, "fp32 loses nothing"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.ones(4))


def test_ranks_that_differ_all_say_so():
    messages = run_threads(differ, 3)
    assert len(set(messages)) == 1
    assert "the recipe differs between ranks: rank 0 has 'a', rank 2 has 'b'; start every rank" in messages[0]


def differ():
    try:
        check_equal("the recipe", repr("b" if dist.get_rank() == 2 else "a"), C10d())
    except ValueError as error:
        return str(error)
    return "no error"
