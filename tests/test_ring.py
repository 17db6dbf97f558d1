"""The ring on thread ranks: exact where sums are, equal on all ranks, within its bound, unbiased where rounding is."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS
from commq.codecs.rotation import Rotation, rotate, unrotate
from commq.collectives.plan import Source, make_plan
from commq.collectives.ring import deal, gather_up
from harness import process_ranks, rank_generator, thread_ranks
from numerics import paired
from test_schedules import piece_bytes

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
ALL_RANKS = range(1, 18)

all_reduce = partial(commq.all_reduce, schedule="ring")


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return rows


def unit_of(numel, fmt, world_size):
    return make_plan((Source(numel, torch.float32, fmt, fmt),), world_size=world_size).parts[0].layout.unit


def partial_sums(inputs_WN, unit):
    """(W, N): in row m - 1 the sum of the first m ranks that an element passes, in the dtype of the inputs."""
    world_size, numel = inputs_WN.shape
    chunk_N = torch.arange(numel) // unit % world_size
    order_WN = (chunk_N + 1 + torch.arange(world_size)[:, None]) % world_size
    return inputs_WN.gather(0, order_WN).cumsum(dim=0)


def bound_of(inputs_WN, fmt, divisor):
    """The bound in the docstring of `ring`, and fp32 rounding: one addition for each rank, one division."""
    world_size, numel = inputs_WN.shape
    sums_WN = partial_sums(inputs_WN.to(torch.float64), unit_of(numel, fmt, world_size))
    error = torch.zeros(numel, dtype=torch.float64)
    for sum_N in sums_WN[:-1]:
        error = error + error_bound((sum_N.abs() + error).to(torch.float32), fmt)
    exact, error = sums_WN[-1] / divisor, error / divisor
    rounding = (world_size + 1) * 2.0**-23 * (inputs_WN.to(torch.float64).abs().sum(dim=0) / divisor + error)
    return exact, error + error_bound((exact.abs() + error).to(torch.float32), fmt) + rounding


@thread_ranks(*ALL_RANKS)
def test_ones_average_to_exactly_one():
    """A block of one value survives, and so do partial sums; power-of-two scales cannot say every integer."""
    world_size = dist.get_world_size()
    for name, numel in [*paired(FORMATS, (1, 127, 1003), world_size), ("int4", 70_001)]:
        tensor = torch.ones(numel)
        all_reduce(tensor, AVG, format=name)
        if not name.startswith("mx"):
            assert bool((tensor == 1.0).all()), (name, numel)
            continue
        exact, bound = bound_of(torch.ones(world_size, numel), FORMATS[name], world_size)
        assert bool(((tensor - exact).abs() <= bound).all()), (name, numel)


@thread_ranks(2, 3, 5, 17)
@pytest.mark.parametrize("op", [AVG, SUM])
def test_within_the_bound_and_equal_on_all_ranks(op):
    for name, fmt in FORMATS.items():
        x = torch.randn(1003, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
        x[501] *= 100
        inputs = torch.stack(gather(x))
        result = x.clone()
        all_reduce(result, op, format=name)
        exact, bound = bound_of(inputs, fmt, dist.get_world_size() if op == AVG else 1)
        assert bool(((result - exact).abs() <= bound).all()), name
        assert all(torch.equal(row, result) for row in gather(result)), name


@thread_ranks(2, 5)
@pytest.mark.parametrize("rotation", [None, Rotation(size=64), Rotation(size=256, signs=True)])
def test_has_the_bits_of_its_definition(rotation):
    """Encode the sum, add the next rank's numbers in fp32, again and again; in the rotated domain, if there is one."""
    world_size, numel, fmt = dist.get_world_size(), 5120, FORMATS["int4"]
    unit = max(128, rotation.size if rotation else 1)
    x = torch.randn(numel, generator=rank_generator(2))
    pattern = rotation.sign_pattern(seed=0, step=0, device=x.device) if rotation else None
    inputs = torch.stack(gather(rotate(x, rotation, pattern) if rotation else x))
    chunk_N = torch.arange(numel) // unit % world_size
    order_WN = (chunk_N + 1 + torch.arange(world_size)[:, None]) % world_size
    first, *others = inputs.gather(0, order_WN)
    for other in others:
        first = commq.decode(commq.encode(first, fmt)) + other
    expected = commq.decode(commq.encode(first / world_size, fmt))
    all_reduce(x, AVG, format="int4", rotation=rotation)
    assert torch.equal(x, unrotate(expected, rotation, pattern) if rotation else expected)


@thread_ranks(2, 3)
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int4"},
        {"format": "sign", "answer": "int8"},
        {"format": "int4", "rounding": "stochastic", "seed": 3, "step": 7},
        {"format": "int4", "rotation": 64, "rounding": "stochastic"},
        {"format": "bf16", "rounding": "stochastic"},
        {"format": "fp16"},
        {"format": "nvfp4", "answer": "bf16"},
    ],
    ids=str,
)
def test_pieces_change_no_bit(options):
    x = torch.randn(70_001, generator=rank_generator(3))
    whole, cut = x.clone(), x.clone()
    all_reduce(whole, AVG, **options)
    with piece_bytes(1 << 14):
        all_reduce(cut, AVG, **options)
    assert torch.equal(whole, cut)


@thread_ranks(3)
def test_a_list_has_the_bits_of_its_tensors_alone():
    xs = [torch.randn(n, generator=rank_generator(n)) for n in (5000, 1, 300, 70_001)]
    xs[1] = xs[1].to(torch.bfloat16)
    together, alone = [x.clone() for x in xs], [x.clone() for x in xs]
    all_reduce(together, AVG, format="int4")
    for tensor in alone:
        all_reduce(tensor, AVG, format="int4")
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


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
    x = torch.randn(256, generator=rank_generator(4))
    inputs = torch.stack(gather(x))
    total, steps, world_size = torch.zeros_like(x), 120, dist.get_world_size()
    for step in range(steps):
        result = x.clone()
        all_reduce(result, AVG, format="int4", rounding="stochastic", step=step)
        total += result
        if step == 0:
            again = x.clone()
            all_reduce(again, AVG, format="int4", rounding="stochastic", step=step)
            assert torch.equal(again, result)
    # A rounding's variance is at most step**2 / 4; what a hop encodes is off by the steps before it at most.
    variance = lost = 0.0
    for m, sum_N in enumerate(partial_sums(inputs, 128), start=1):
        divisor = world_size if m == world_size else 1
        width = (float(sum_N.abs().max()) + lost) / divisor / 7
        variance += width**2 / 4 * (divisor / world_size) ** 2
        lost += width
    # 256 elements: the chance that a normal number is beyond 5 deviations is 6e-7 for each.
    assert float((total / steps - inputs.mean(dim=0)).abs().max()) < 5 * (variance / steps) ** 0.5


@pytest.mark.parametrize("world_size", ALL_RANKS)
def test_dealing_puts_every_unit_in_the_chunk_of_its_number(world_size):
    fmt = FORMATS["int4"]
    layout = make_plan((Source(10_000, torch.float32, fmt, fmt),), world_size=world_size).parts[0].layout
    x = torch.arange(layout.chunks * layout.chunk_numel)
    dealt = deal(x, layout, 1)
    assert torch.equal(gather_up(dealt, layout, 1), x)
    for chunk, row in enumerate(dealt.view(world_size, -1)):
        assert bool((row // 128 % world_size == chunk).all())
    assert torch.equal(deal(x[::128], layout, 128), dealt[::128])


@process_ranks(3)
def test_over_sockets():
    tensors = [torch.full((30_000,), float(i + dist.get_rank())) for i in range(3)]
    works = [all_reduce(t, AVG, format="int8", async_op=True) for t in tensors]
    for i, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
        assert work.wait() and bool((tensor == i + 1.0).all())


@thread_ranks(2)
def test_keeps_no_residual():
    with pytest.raises(ValueError, match="schedule 'ring' keeps no residual"):
        all_reduce(torch.ones(4), format="int8", residual=torch.zeros(4))
