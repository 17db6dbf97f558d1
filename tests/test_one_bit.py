"""The ring of one bit an element: merges are unbiased, results are +S or -S, the same on all ranks, in all pieces."""

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.formats import get_format
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout, pack
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.message import Operand, make_messages
from commq.collectives.one_bit import deal, gather_up, merge_stream, one_bit, send_stream
from commq.collectives.plan import Source, make_plans
from commq.collectives.schedule import Exchange
from commq.collectives.transport import C10d
from harness import rank_generator, run_processes, run_threads, thread_ranks
from numerics import nasty_inputs

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
SIGN = {"format": "sign", "schedule": "one_bit"}
TINY = 2.0**-148


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def scales_of(x_WN, rounding="nearest", block=128):
    """Every rank's scale of each element's block: mean |x| without padding, or largest |x|: (W, N), float64."""
    numel = x_WN.shape[1]
    magnitudes = x_WN.abs().to(torch.float64)
    blocks = torch.nn.functional.pad(magnitudes, (0, -numel % block)).unflatten(1, (-1, block))
    if rounding == "stochastic":
        s = blocks.amax(dim=-1)
    else:
        valid = torch.nn.functional.pad(torch.ones(numel), (0, -numel % block)).view(-1, block).sum(dim=-1)
        s = blocks.sum(dim=-1) / valid
    return s.repeat_interleave(block, dim=1)[:, :numel]


@thread_ranks(*range(1, 18))
def test_ones_are_exact():
    world_size = dist.get_world_size()
    cases = [(numel, AVG, 1.0, "nearest") for numel in (1, 127, 128, 1003)]
    cases.append((1003, SUM, -1.0, "stochastic"))
    for numel, op, sign, rounding in cases:
        tensor = torch.full((numel,), sign)
        commq.all_reduce(tensor, op, rounding=rounding, **SIGN)
        assert bool((tensor == sign * (world_size if op == SUM else 1)).all()), (numel, op, sign, rounding)


@thread_ranks(2, 3, 5, 17)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_results_are_plus_or_minus_the_sum_of_scales(rounding):
    """Ranks whose magnitudes differ by 1000. So |result - mean| <= S / W + |mean|, and all ranks agree."""
    x = torch.randn(1003, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
    x[501] *= 100
    inputs = gather(x)
    world_size = len(inputs)
    s = scales_of(inputs, rounding).mean(dim=0)
    for op, times in ((AVG, 1), (SUM, world_size)):
        result = x.clone()
        commq.all_reduce(result, op, rounding=rounding, **SIGN)
        # A scale is rounded once, their sum once for each rank, and the division.
        assert bool(((result.abs() - s * times).abs() <= s * times * (world_size + 9) * 2.0**-24).all())
        assert all(torch.equal(row, result) for row in gather(result))
        where_all_agree = inputs.sign().sum(dim=0).abs() == world_size
        if rounding == "nearest":
            assert torch.equal(result.sign()[where_all_agree], x.sign()[where_all_agree])


@thread_ranks(2, 4, 5)
@pytest.mark.parametrize("equal", [True, False], ids=["equal scales", "other scales"])
def test_the_merge_is_unbiased(equal):
    """How often +1 comes out, over steps and blocks. With equal scales: the share of ranks that have +1 (Marsit)."""
    world_size, rank, steps, blocks = dist.get_world_size(), dist.get_rank(), 10, 400
    signs = torch.randint(0, 2, (128,), generator=rank_generator(2)) * 2.0 - 1.0
    x = signs * (1.0 if equal else 0.5 + 2.0 * rank)
    codes = gather(x).to(torch.float64)
    s_sum = codes.abs().sum(dim=0)
    plus = torch.zeros(128, dtype=torch.float64)
    for step in range(steps):
        result = x.repeat(blocks)
        commq.all_reduce(result, AVG, step=step, **SIGN)
        result = result.view(blocks, 128)
        assert bool((result.abs() == (s_sum / world_size).to(torch.float32)).all())
        plus += (result > 0).sum(dim=0)
    p = (1 + codes.sum(dim=0) / s_sum) / 2
    if equal:
        assert float((p - (codes > 0).to(torch.float64).mean(dim=0)).abs().max()) <= 2.0**-50
    # The variance that the docstring states, in units of 2 S: one try is +S with probability p, else -S.
    variance = (s_sum**2 - codes.sum(dim=0) ** 2) / (2 * s_sum) ** 2
    off, bias = plus / (steps * blocks) - p, 2.0**-17 * (world_size - 1)
    assert bool((off.abs() <= 5 * (variance / (steps * blocks)).sqrt() + bias).all())
    # Draws are independent, so the mean over elements is nearer by the root of their number.
    assert abs(float(off.mean())) <= 5 * float((variance / (steps * blocks)).sum().sqrt()) / 128 + bias


@thread_ranks(4)
@pytest.mark.parametrize("rotation", [None, Rotation(size=64, signs=True)], ids=str)
def test_stochastic_codes_and_merges_average_to_the_mean(rotation):
    x = torch.randn(128, generator=rank_generator(3))
    inputs = gather(x)
    total, steps, blocks, widest = torch.zeros(128, dtype=torch.float64), 10, 200, 0.0
    for step in range(steps):
        result, again = x.repeat(blocks), x.repeat(blocks)
        for tensor in (result, again):
            commq.all_reduce(tensor, AVG, rounding="stochastic", step=step, rotation=rotation, **SIGN)
        assert torch.equal(result, again)
        total += result.view(blocks, 128).sum(dim=0)
        # What is +S or -S has a deviation of at most S. Rotated back, an element's variance is at most the mean of
        # those of its run, which is the run's mean square.
        runs = result.view(-1, 64)
        widest = max(widest, float((runs.norm(dim=-1) / 8 if rotation else runs.abs()).max()))
    off = (total / (steps * blocks) - inputs.to(torch.float64).mean(dim=0)).abs()
    # The codes' and three merges' probabilities are right within 2**-17; a run of 64 may add these up.
    bias = 4 * 2.0**-16 * widest * (8 if rotation else 1)
    assert float(off.max()) <= 5 * widest / (steps * blocks) ** 0.5 + bias


@thread_ranks(2, 3)
def test_every_step_and_rank_draws_its_own_bits():
    streams = [f(rank) for rank in range(1 << 12) for f in (send_stream, merge_stream)]
    assert len(set(streams)) == len(streams)
    x = torch.ones(4096) * (1 - 2 * (dist.get_rank() % 2))
    results = []
    for step in range(3):
        results.append(x.clone())
        commq.all_reduce(results[-1], AVG, step=step, **SIGN)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert not torch.equal(results[0][:2048], results[0][2048:])


@thread_ranks(3)
@pytest.mark.parametrize("case", [name for name, x in nasty_inputs().items() if bool(x.isfinite().all())])
def test_hard_inputs(case):
    x = nasty_inputs()[case]
    x = x if dist.get_rank() != 1 else x.flip(0)
    inputs = gather(x)
    for rounding in ("nearest", "stochastic"):
        result = x.clone()
        s = scales_of(inputs, rounding).mean(dim=0)
        commq.all_reduce(result, AVG, rounding=rounding, **SIGN)
        if case == "one huge value" and rounding == "stochastic":
            # Two blocks hold the largest float on one rank or two: the sum of scales may be infinite, then it is NaN.
            s = torch.where(s * 3 > torch.finfo(torch.float32).max, torch.nan, s)
        assert torch.equal(result.isnan(), s.isnan())
        assert bool(((result.abs() - s).abs() <= s * 12 * 2.0**-24 + 4 * TINY)[~s.isnan()].all())
        if case == "zeros":
            assert bool((result == 0).all())


@thread_ranks(3)
def test_a_rank_of_zeros_changes_nothing():
    signs = torch.randint(0, 2, (1000,), generator=torch.Generator().manual_seed(5)) * 2.0 - 1.0
    tensor = signs * 2.0 if dist.get_rank() == 1 else torch.zeros(1000)
    commq.all_reduce(tensor, SUM, **SIGN)
    assert torch.equal(tensor, signs * 2.0)


@thread_ranks(2, 3)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", range(3))
def test_not_finite_on_one_rank_is_nan_on_all(value, at):
    for rounding in ("nearest", "stochastic"):
        tensor = torch.ones(1000)
        if dist.get_rank() == at % dist.get_world_size():
            tensor[130] = value
        commq.all_reduce(tensor, AVG, rounding=rounding, **SIGN)
        assert bool(tensor[128:256].isnan().all())
        assert bool((tensor[:128] == 1).all()) and bool((tensor[256:] == 1).all())


def reduce_long(options):
    tensor = torch.randn(70_001, generator=rank_generator(6))
    commq.all_reduce(tensor, AVG, **SIGN, **options)
    return tensor


@pytest.mark.parametrize(
    "options",
    [{"seed": 3, "step": 7}, {"rounding": "stochastic"}, {"rotation": 512, "rounding": "stochastic"}],
    ids=str,
)
def test_pieces_change_no_bit(options, monkeypatch):
    whole = run_threads(reduce_long, 3, args=(options,))
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1 << 14)
    for first, second in zip(whole, run_threads(reduce_long, 3, args=(options,)), strict=True):
        assert torch.equal(first, second)


def test_processes_give_the_same_bits_as_threads():
    for options in ({}, {"rounding": "stochastic"}):
        threads, processes = (run(reduce_long, 3, args=(options,)) for run in (run_threads, run_processes))
        assert all(torch.equal(a, b) for a, b in zip(threads, processes, strict=True))


@thread_ranks(3)
def test_a_list_has_the_bits_of_its_tensors_alone():
    xs = [torch.randn(n, generator=rank_generator(n)) for n in (5000, 1, 300, 20_001)]
    xs[2] = xs[2].to(torch.bfloat16)
    together, alone = [x.clone() for x in xs], [x.clone() for x in xs]
    commq.all_reduce(together, AVG, **SIGN)
    for tensor in alone:
        commq.all_reduce(tensor, AVG, **SIGN)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_blocks_are_dealt_like_cards():
    layout = Layout(get_format("sign", block=16, scale="fp32"), 3 * 2 * 16, 3)
    rows, dealt, back = (torch.full((3, layout.chunk_bytes), 255, dtype=torch.uint8) for _ in range(3))
    numbers = torch.arange(6)
    codes = (numbers[:, None] >> torch.arange(16)) & 1  # each block holds its number, so does its scale
    layout.codes(rows).copy_(pack(codes.view(3, -1), 1))
    layout.scales(rows).copy_(numbers.to(torch.float32).view(3, 2).view(torch.uint8))
    deal(rows, dealt, layout)
    assert layout.codes(dealt)[:, ::2].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert layout.scales(dealt).clone().view(torch.float32).tolist() == [[0, 3], [1, 4], [2, 5]]
    gather_up(dealt, back, layout)
    assert torch.equal(layout.codes(back), layout.codes(rows)) and torch.equal(layout.scales(back), layout.scales(rows))


@thread_ranks(2)
def test_feedback_of_the_own_signs():
    """With the same tensor on all ranks the result is each rank's own code: inputs == outputs + residual."""
    fmt, residual = get_format("sign", scale="fp32"), torch.zeros(5000)
    for step in range(4):
        x = torch.randn(5000, generator=torch.Generator().manual_seed(step))
        result, before = x.clone(), residual.clone()
        plans = make_plans((Source(5000, x.dtype, fmt, fmt),), world_size=2, piece_bytes=1 << 13)
        operand = Operand(result, result, Coding(step=step), residual_N=residual)
        Exchange(map(one_bit, make_messages(plans, [operand], C10d(), average=True))).finish()
        assert torch.equal(residual, (x + before) - result)


@thread_ranks(2)
@pytest.mark.parametrize("name", ["int8", "int2", "mxfp4", "fp8_e5m2"])
def test_formats_of_more_than_one_bit(name):
    tensor = torch.ones(1000)
    with pytest.raises(ValueError, match=f"format '{name}': its merge chooses between two signs; use sign"):
        commq.all_reduce(tensor, format=name, schedule="one_bit")
    assert bool((gather(tensor) == 1.0).all())  # nothing was sent: the next move is the same on all ranks
