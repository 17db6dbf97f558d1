"""Sums of codes as integers: fields never overflow, results are within their bounds and the same on all ranks."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.formats import get_format
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation, rotate
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.integer_sum import integer_sum, sent_bytes
from commq.collectives.levels import THC_TABLES, Fields, Table
from commq.collectives.message import Operand, make_messages
from commq.collectives.plan import Source, make_plans
from commq.collectives.schedule import Exchange
from commq.collectives.transport import C10d
from harness import rank_generator, run_processes, run_threads, thread_ranks
from numerics import nasty_inputs

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
INTEGERS = ("int8", "int4", "int2")
CHOICES = [("integer_sum", name) for name in (*INTEGERS, "sign")] + [("thc", "int4")]
TINY = 2.0**-148


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def of_blocks(x_WN, reduce):
    """A number for each rank and block of 128, repeated for the block's elements: (W, N), float64."""
    numel = x_WN.shape[1]
    blocks = torch.nn.functional.pad(x_WN.abs().to(torch.float64), (0, -numel % 128)).unflatten(1, (-1, 128))
    return reduce(blocks).repeat_interleave(128, dim=1)[:, :numel]


def largest(blocks):
    return blocks.amax(dim=-1)


def bound_of(x_WN, schedule, name, rounding):
    """|result - exact mean| is at most this, element by element, for tensors in blocks of 128."""
    s = of_blocks(x_WN, largest).amax(dim=0)
    slack = s * 2.0**-21 + TINY  # float32: the scaled number, which may tip a rounding, and the result
    steps = 0.5 if rounding == "nearest" else 1.0 + 2.0**-16
    if schedule == "thc":
        levels = THC_TABLES[4].levels
        return steps * 2.0 * max(b - a for a, b in pairwise(levels)) / levels[-1] * s + slack
    if name == "sign":
        magnitude = x_WN.abs().to(torch.float64)
        if rounding == "stochastic":
            return magnitude.mean(dim=0) + s + slack
        valid = of_blocks(torch.ones_like(x_WN), lambda blocks: blocks.sum(dim=-1))
        means = of_blocks(x_WN, lambda blocks: blocks.sum(dim=-1)) / valid
        return torch.maximum(magnitude, means.mean(dim=0)).mean(dim=0) + slack
    return steps * s / get_format(name).max_code + slack


# The words


@pytest.mark.parametrize(
    ("top", "world_size", "bits", "lanes"),
    [
        (14, 2, 5, 6),
        (14, 4, 6, 5),
        (14, 16, 8, 4),  # all 32 bits
        (14, 17, 8, 4),
        (254, 4, 10, 3),
        (254, 17, 13, 2),
        (254, 1 << 20, 28, 1),
        (2, 4, 4, 8),
        (1, 4, 3, 10),
        (1, 15, 4, 7),  # eight would sum to one less than an int32 holds
        (30, 4, 7, 4),
    ],
)
def test_fields_of_a_word(top, world_size, bits, lanes):
    fields = Fields(world_size, top)
    assert (fields.bits, fields.lanes) == (bits, lanes)
    assert fields.words(1000) == -(-1000 // lanes)


@pytest.mark.parametrize("top", [1, 2, 14, 16, 30, 254])
def test_no_sum_of_words_overflows_and_no_field_carries(top):
    for world_size in (*range(1, 70), 127, 128, 255, 256, 257, 1 << 20):
        fields = Fields(world_size, top)
        count = fields.lanes + 3
        levels_C = torch.randint(0, top + 1, (count,), generator=torch.Generator().manual_seed(world_size))
        for chosen_C in (levels_C, torch.zeros_like(levels_C), torch.full_like(levels_C, top)):
            words_V = fields.pack(chosen_C)
            # All ranks send the same; sums of fewer ranks lie between this one and 0.
            total_V = words_V.to(torch.int64) * world_size
            assert int(total_V.min()) >= -(2**31) and int(total_V.max()) < 2**31
            assert torch.equal(fields.unpack(total_V.to(torch.int32), count), chosen_C * world_size)


def test_fields_add_up_over_ranks_with_different_levels():
    fields = Fields(17, 254)
    levels_WC = torch.randint(0, 255, (17, 1003), generator=torch.Generator().manual_seed(0))
    total_V = torch.stack([fields.pack(levels_C) for levels_C in levels_WC]).sum(dim=0, dtype=torch.int32)
    assert torch.equal(fields.unpack(total_V, 1003), levels_WC.sum(dim=0))


def test_levels_that_no_word_holds():
    with pytest.raises(ValueError, match=r"33554432 ranks with levels 0\.\.254 sum to .* does not fit an int32"):
        Fields(1 << 25, 254)


def test_sent_bytes():
    numel = 1 << 20
    elements = 2 * 3 / 4 * numel / 8  # a ring all-reduce of one bit an element
    assert abs(sent_bytes(numel, get_format("int4"), 4) / elements - (6.4 + 0.25)) < 1e-3
    assert abs(sent_bytes(numel, get_format("int4"), 4, table=THC_TABLES[4]) / elements - (8 + 0.25)) < 1e-3
    assert abs(sent_bytes(numel, get_format("sign"), 4) / elements - (3.2 + 0.25)) < 1e-3


def test_tables():
    for bits, table in THC_TABLES.items():
        assert len(table.levels) == 2**bits and table.index_bits == bits
        assert [table.top - level for level in reversed(table.levels)] == list(table.levels)
    y = torch.linspace(0, 30, 3001)
    table = THC_TABLES[4]
    levels = torch.tensor(table.levels)
    nearest = (y[:, None] - levels).abs().amin(dim=1)
    assert torch.equal((y - table.round(y, None)).abs(), nearest)
    # Every value of the 16 random bits once: the mean is right within 2**-17 of a gap.
    random = torch.arange(1 << 16)
    for value in (0.0, 1.0, 13.4, 14.9, 27.001, 30.0):
        mean = float(table.round(torch.full((1 << 16,), value), random).to(torch.float64).mean())
        assert abs(mean - value) <= 3 * (2.0**-17 + 2.0**-24) + 30 * 2.0**-24


# The schedule


@thread_ranks(*range(1, 18))
def test_ones_are_exact():
    world_size = dist.get_world_size()
    for schedule, name in CHOICES:
        for numel in (1, 127, 128, 1003):
            for op, expected in ((AVG, 1.0), (SUM, float(world_size))):
                tensor = torch.ones(numel)
                commq.all_reduce(tensor, op, format=name, schedule=schedule)
                assert bool((tensor == expected).all()), (schedule, name, numel)


@thread_ranks(2, 3, 17)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_within_the_bound_and_equal_on_all_ranks(rounding):
    """Ranks whose magnitudes differ by 1000, one huge element, a length that is a multiple of nothing."""
    x = torch.randn(1003, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
    x[501] *= 100
    inputs = gather(x)
    exact = inputs.to(torch.float64).mean(dim=0)
    for schedule, name in CHOICES:
        bound = bound_of(inputs, schedule, name, rounding)
        result, total = x.clone(), x.clone()
        commq.all_reduce(result, AVG, format=name, schedule=schedule, rounding=rounding)
        assert bool(((result - exact).abs() <= bound).all()), (schedule, name)
        assert all(torch.equal(row, result) for row in gather(result)), (schedule, name)
        commq.all_reduce(total, SUM, format=name, schedule=schedule, rounding=rounding)
        world_size = len(inputs)
        assert bool(((total - exact * world_size).abs() <= bound * world_size).all()), (schedule, name)


@thread_ranks(3, 17)
def test_every_rank_at_either_end():
    """The largest sums of levels: s everywhere, -s everywhere, and both side by side."""
    for schedule, name in CHOICES:
        for signs in (torch.ones(1000), -torch.ones(1000), torch.tensor([1.0, -1.0]).repeat(500)):
            tensor = signs * 3.0
            commq.all_reduce(tensor, AVG, format=name, schedule=schedule)
            assert torch.equal(tensor, signs * 3.0), (schedule, name)


@thread_ranks(3)
@pytest.mark.parametrize("case", [name for name, x in nasty_inputs().items() if bool(x.isfinite().all())])
def test_hard_inputs_are_within_the_bound(case):
    x = nasty_inputs()[case]
    x = x if dist.get_rank() != 1 else x.flip(0)
    inputs = gather(x)
    exact = inputs.to(torch.float64).mean(dim=0)
    for schedule, name in CHOICES:
        for rounding in ("nearest", "stochastic"):
            result = x.clone()
            commq.all_reduce(result, AVG, format=name, schedule=schedule, rounding=rounding)
            bound = bound_of(inputs, schedule, name, rounding)
            assert bool(((result - exact).abs() <= bound).all()), (schedule, name, rounding)
            if case == "zeros":
                assert bool((result == 0).all())


@thread_ranks(3)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_on_one_rank_is_nan_on_all(rounding, value):
    for schedule, name in CHOICES:
        tensor = torch.ones(1000)
        if dist.get_rank() == 1:
            tensor[130] = value
        commq.all_reduce(tensor, AVG, format=name, schedule=schedule, rounding=rounding)
        assert bool(tensor[128:256].isnan().all()), (schedule, name)
        assert bool((tensor[:128] == 1).all()) and bool((tensor[256:] == 1).all()), (schedule, name)


@thread_ranks(4)
@pytest.mark.parametrize(("schedule", "name"), CHOICES)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats(schedule, name):
    x = torch.randn(256, generator=rank_generator(2))
    inputs = gather(x)
    total, steps = torch.zeros(256, dtype=torch.float64), 150
    for step in range(steps):
        result = x.clone()
        options = {"format": name, "schedule": schedule, "rounding": "stochastic", "step": step}
        commq.all_reduce(result, AVG, **options)
        total += result
        if step == 0:
            again = x.clone()
            commq.all_reduce(again, AVG, **options)
            assert torch.equal(again, result)
    # One rank's rounding has a variance of at most gap**2 / 4; four ranks are averaged, and then the steps.
    s = of_blocks(inputs, largest).amax(dim=0)
    gap = s * {"thc": 2 * 3 / 30}.get(schedule, 2.0 if name == "sign" else 1 / get_format(name).max_code)
    deviation = gap / 2 / (4 * steps) ** 0.5
    off = (total / steps - inputs.to(torch.float64).mean(dim=0)).abs()
    assert bool((off <= 5 * deviation + gap * 2.0**-17 + s * 2.0**-21).all())


@thread_ranks(8)
def test_ranks_round_by_their_own_numbers():
    """With the same tensor on all ranks the errors of W roundings average out: the variance is one W-th."""
    x = torch.rand(128 * 40, generator=torch.Generator().manual_seed(10))
    result = x.clone()
    commq.all_reduce(result, AVG, format="int4", schedule="integer_sum", rounding="stochastic")
    step = x.view(-1, 128).amax(dim=-1).repeat_interleave(128) / 7
    share = x / step - (x / step).floor()
    expected = float((step**2 * share * (1 - share)).sum()) / 8
    assert 0.9 * expected < float(((result - x) ** 2).sum()) < 1.1 * expected


def reduce_long(options):
    tensor = torch.randn(70_001, generator=rank_generator(3))
    commq.all_reduce(tensor, AVG, **options)
    return tensor


@pytest.mark.parametrize(
    "options",
    [
        {"format": "int8", "schedule": "integer_sum"},
        {"format": "int4", "schedule": "integer_sum", "rounding": "stochastic", "seed": 3, "step": 7},
        {"format": "int4", "schedule": "integer_sum", "rotation": Rotation(size=256, signs=True)},
        {"format": "sign", "schedule": "integer_sum"},
        {"format": "sign", "schedule": "integer_sum", "rounding": "stochastic"},
        {"format": "int4", "schedule": "thc", "rounding": "stochastic", "rotation": 64},
    ],
    ids=str,
)
def test_pieces_change_no_bit(options, monkeypatch):
    whole = run_threads(reduce_long, 3, args=(options,))
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1 << 14)
    for first, second in zip(whole, run_threads(reduce_long, 3, args=(options,)), strict=True):
        assert torch.equal(first, second)


def reduce_choices():
    results = []
    for schedule, name in CHOICES:
        for rounding in ("nearest", "stochastic"):
            tensor = torch.randn(1003, generator=rank_generator(4))
            commq.all_reduce(tensor, AVG, format=name, schedule=schedule, rounding=rounding)
            # gloo adds the float32 means of sign in an order of its own.
            results.append(tensor if (name, rounding) != ("sign", "nearest") else tensor.sign())
    return torch.stack(results)


def test_processes_give_the_same_bits_as_threads():
    for threads, processes in zip(run_threads(reduce_choices, 3), run_processes(reduce_choices, 3), strict=True):
        assert torch.equal(threads, processes)


@thread_ranks(3)
def test_a_list_has_the_bits_of_its_tensors_alone():
    xs = [torch.randn(n, generator=rank_generator(n)) for n in (5000, 1, 300, 20_001)]
    xs[2] = xs[2].to(torch.bfloat16)
    for name in ("int4", "sign"):
        together, alone = [x.clone() for x in xs], [x.clone() for x in xs]
        commq.all_reduce(together, AVG, format=name, schedule="integer_sum")
        for tensor in alone:
            commq.all_reduce(tensor, AVG, format=name, schedule="integer_sum")
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@thread_ranks(17)
def test_what_would_not_be_smaller_travels_as_it_is():
    """int8 of 17 ranks takes 16 bits and a scale: no gain over bfloat16."""
    x = torch.randn(1000, generator=rank_generator(5)).to(torch.bfloat16)
    summed, plain = x.clone(), x.clone()
    commq.all_reduce(summed, format="int8", schedule="integer_sum")
    commq.all_reduce(plain, format="int8", schedule="plain")
    assert torch.equal(summed, plain)


@thread_ranks(3)
def test_rotation_errs_within_the_bound_of_the_rotated_blocks():
    rotation, ones = Rotation(size=64, signs=True), torch.ones(1024)
    fmt = get_format("int4", block=64)
    commq.all_reduce(ones, AVG, format=fmt, schedule="integer_sum", rotation=64)
    assert bool((ones == 1.0).all())
    x = torch.randn(1024, generator=rank_generator(6))
    x[100] = 50.0
    inputs, result = gather(x), x.clone()
    commq.all_reduce(result, AVG, format=fmt, schedule="integer_sum", rotation=rotation)
    signs = rotation.sign_pattern(seed=0, step=0, device=x.device)
    s_R = torch.stack([rotate(row, rotation, signs) for row in inputs]).view(3, -1, 64).abs().amax(dim=(0, 2))
    off_R = (result - inputs.to(torch.float64).mean(dim=0)).view(-1, 64).norm(dim=-1)
    # Each rotated element is off by half a step at most; the transform keeps the 2-norm, its six additions round.
    assert bool((off_R <= 8 * (s_R / 14 + s_R * 2.0**-20)).all())


@thread_ranks(2, 3)
@pytest.mark.parametrize("name", ["int4", "sign"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_feedback_keeps_what_was_lost(name, decay):
    """e <- decay e + (1 - decay) (x + e - sent), where the mean of what ranks sent is the result; a NaN keeps e."""
    numel, fmt = 5000, get_format(name)
    residual = torch.zeros(numel)
    for _ in range(4):
        x = torch.randn(numel, generator=rank_generator(7))
        exact, before = (gather(t).to(torch.float64).mean(dim=0) for t in (x, residual))
        exchange(x, fmt, residual, decay)
        after = gather(residual).to(torch.float64).mean(dim=0)
        expected = decay * before + (1 - decay) * (exact + before - x)
        assert float((after - expected).abs().max()) <= 2.0**-21 * float(exact.abs().max() + x.abs().max())
    assert float(after.abs().max()) > 0
    kept, x = residual.clone(), torch.randn(numel, generator=rank_generator(8))
    if dist.get_rank() == 1:
        x[130] = torch.nan
    exchange(x, fmt, residual, decay)
    assert torch.equal(residual[128:256], kept[128:256])
    assert bool(residual.isfinite().all()) and not torch.equal(residual, kept)


def exchange(x, fmt, residual, decay):
    """Average x in place, with a residual, in pieces."""
    transport = C10d()
    plans = make_plans((Source(x.numel(), x.dtype, fmt, fmt),), world_size=transport.world_size, piece_bytes=1 << 13)
    operand = Operand(x, x, Coding(), residual_N=residual, decay=decay)
    messages = make_messages(plans, [operand], transport, average=True)
    Exchange(integer_sum(message) for message in messages).finish()


@thread_ranks(2)
@pytest.mark.parametrize(
    ("schedule", "name", "says"),
    [
        ("integer_sum", "mxfp4", "format 'mxfp4': its codes would be added as integers"),
        ("integer_sum", "nvfp4", "format 'nvfp4': its codes would be added as integers"),
        ("integer_sum", "fp8_e4m3", "use int8, int4, int2 or sign, or schedule two_shot"),
        ("thc", "int8", "'int8' with a table of 16 levels; .* an index of 4 bits, such as int4"),
        ("thc", "int2", "'int2' with a table of 16 levels"),
        ("thc", "sign", "'sign': its table has levels for 4 bits; use int4, or schedule two_shot"),
    ],
)
def test_formats_whose_codes_do_not_add_up(schedule, name, says):
    tensor = torch.ones(1000)
    with pytest.raises(ValueError, match=says):
        commq.all_reduce(tensor, format=name, schedule=schedule)
    assert bool((tensor == 1.0).all())
    assert bool((gather(tensor) == 1.0).all())  # nothing was sent: the next move is the same on all ranks


@pytest.mark.parametrize("levels", [(0,), (1, 2), (0, 2, 1), (0, 1, 1)])
def test_tables_that_are_none(levels):
    with pytest.raises(ValueError, match="expected increasing integers that start at 0"):
        Table(levels)


@thread_ranks(3)
def test_another_table():
    """Three bits of index, in the format that holds them; and a table of all levels, which is as good as none."""
    x = torch.randn(1000, generator=rank_generator(9))
    inputs, fmt = gather(x), get_format("int4")
    exact = inputs.to(torch.float64).mean(dim=0)
    s = of_blocks(inputs, largest).amax(dim=0)
    for table, half_a_gap in ((Table(tuple(range(15))), 1 / 14), (THC_TABLES[3], 3 / 16)):
        result = x.clone()
        plans = make_plans((Source(1000, x.dtype, fmt, fmt),), world_size=3, piece_bytes=1 << 20)
        messages = make_messages(plans, [Operand(result, result, Coding())], C10d(), average=True)
        Exchange(map(partial(integer_sum, table=table), messages)).finish()
        assert bool(((result - exact).abs() <= s * (half_a_gap + 2.0**-21)).all())
