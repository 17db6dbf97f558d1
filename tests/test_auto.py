"""schedule="auto": the choice as integers, and what all ranks must have in common."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commq
from commq.attach.bucket import make_bucket
from commq.codecs.formats import get_format
from commq.collectives import link
from commq.collectives.cost import Costs, choose, predict
from commq.collectives.hosts import Hosts
from commq.collectives.link import Curve, rising, time_call
from commq.collectives.memory import memory_of
from commq.collectives.plan import Source, make_plan, make_plans
from commq.collectives.route import Route
from fake_bucket import FakeBucket, Recorder, exchange_all
from harness import process_ranks, rank_generator, run_processes, run_threads, thread_ranks

SIZES = [4096 << i for i in range(17)]  # 4 KiB .. 256 MiB
GIGABIT = 125_000_000  # bytes a second


def line(latency, bytes_per_second):
    """A move that takes `latency` nanoseconds and its bytes' time."""
    return Curve(
        ((4096, latency + 4096 * 10**9 // bytes_per_second), (1 << 26, latency + (10**9 << 26) // bytes_per_second))
    )


def costs_at(rate, *, world_size=4, latency=100_000, codec_rate=2_000_000_000):
    """Costs of a link of `rate` bytes a second, where plain all-reduces are rings at the line's rate."""
    codecs = {name: line(20_000, codec_rate) for name in ("one_shot", "two_shot")}
    sums = line(2 * latency, rate * world_size // (2 * (world_size - 1)))
    return Costs(moves={"all": line(latency, rate)}, sums=sums, codecs=codecs)


def plans_of(nbytes, name="int4", dtype=torch.float32, world_size=4):
    source = Source(nbytes // dtype.itemsize, dtype, get_format(name), get_format(name))
    return make_plans((source,), world_size=world_size, piece_bytes=4 << 20)


def test_curves_are_straight_between_points_and_beyond_the_last():
    curve = Curve(((100, 1000), (200, 3000), (400, 4000)))
    asked = {0: 1000, 100: 1000, 150: 2000, 200: 3000, 300: 3500, 400: 4000, 800: 6000}
    assert {nbytes: curve.nanoseconds(nbytes) for nbytes in asked} == asked
    assert rising([(1, 50), (2, 30), (3, 40)]).points == ((1, 30), (2, 30), (3, 40))
    assert Curve(((5, 7),)).nanoseconds(1000) == 7


def test_slow_links_compress_and_fast_ones_do_not():
    for nbytes in SIZES:
        chosen = choose(plans_of(nbytes), costs_at(GIGABIT // 10))
        assert chosen == ("two_shot" if nbytes > 1 << 20 else chosen) != "plain"
        # A link as fast as memory: codecs cost more than they save.
        assert choose(plans_of(nbytes), costs_at(100 * GIGABIT, latency=5_000)) == "plain"


def test_short_messages_take_one_shot_and_long_ones_two():
    chosen = [choose(plans_of(nbytes), costs_at(GIGABIT)) for nbytes in SIZES]
    assert chosen[0] == "one_shot" and chosen[-1] == "two_shot"
    assert chosen == sorted(chosen), "it changes once"


def test_plain_wins_unless_another_is_clearly_faster():
    plans = plans_of(1 << 24)
    costs = costs_at(GIGABIT)
    time = predict("two_shot", plans, costs)
    for factor, chosen in ((105, "plain"), (115, "two_shot")):
        sums = Curve(((1, time * factor // 100), (1 << 40, time * factor // 100)))
        assert choose(plans, replace(costs, sums=sums)) == chosen


def test_pieces_hide_the_lesser_of_wire_and_codec():
    costs = costs_at(GIGABIT, codec_rate=GIGABIT)
    source = Source(1 << 22, torch.float32, get_format("int4"), get_format("int4"))
    whole = predict("two_shot", [make_plan((source,), world_size=4)], costs)
    assert predict("two_shot", plans_of(1 << 24), costs) < 0.9 * whole


def pick_for_lengths():
    """What each rank chose, and what it measured, for messages of several lengths."""
    results = []
    for numel in (100, 50_000, 400_000):
        x = torch.randn(numel, generator=rank_generator(numel))
        commq.all_reduce(x, dist.ReduceOp.AVG, format="int4")
        results.append(x)
    return memory_of(dist.group.WORLD).facts, results


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_measure_and_choose_alike(world_size):
    facts, results = zip(*run_threads(pick_for_lengths, world_size), strict=True)
    assert all(fact == facts[0] for fact in facts[1:]) and facts[0]
    for rows in zip(*results, strict=True):
        assert all(torch.equal(row, rows[0]) for row in rows)
    picked = {value for key, value in facts[0].items() if key[0] == "picked"}
    told = {key[2]: value for key, value in facts[0].items() if key[0] == "told"}
    assert told and set(told.values()) <= picked and all((value == "plain") == plain for plain, value in told.items())
    assert picked <= {"plain", "one_shot", "two_shot"}


def choose_nothing_twice():
    x = torch.ones(1000)
    commq.all_reduce(x, format="int8")
    facts = dict(memory_of(dist.group.WORLD).facts)
    for step in range(3):
        commq.all_reduce(x, format="int8", rounding="nearest", step=step, seed=step)
    return facts == memory_of(dist.group.WORLD).facts


@process_ranks(2)
def test_a_known_message_is_not_measured_again():
    assert choose_nothing_twice()


@pytest.mark.parametrize("recipe", ["int4", "onebit", "qsgd"])
def test_a_bucket_of_ddp_is_laid_out_once_and_measured_without_its_residual(recipe, monkeypatch):
    laid = []

    def spy(members, recipe, residual, *, buffer, **options):
        laid.append((buffer.device.type, make_bucket(members, recipe, residual, buffer=buffer, **options)))
        return laid[-1][1]

    monkeypatch.setattr("commq.attach.layouts.make_bucket", spy)
    state = commq.HookState(commq.recipe(recipe, schedule="auto"), transport=Recorder())
    monkeypatch.setattr(state._layouts, "_route", lambda name, bucket, device, **_: Route("two_shot", plans(bucket)))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((65, 70), (70,))]
    exchange_all(state, [FakeBucket(0, parameters, True)])
    (trial, trial_bucket), (real, bucket) = laid
    assert (trial, real) == ("meta", "cpu") and trial_bucket.sources == bucket.sources


def plans(bucket):
    return make_plans(bucket.sources, world_size=2, piece_bytes=4 << 20)


@thread_ranks(2, 3)
def test_a_call_that_travels_plain_goes_straight_to_the_library_from_then_on():
    """The same bits and bytes as the first call, whatever the step; other calls are not taken for it."""
    memory, world_size = memory_of(dist.group.WORLD), dist.get_world_size()
    for op, divisor in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, world_size)):
        x = torch.randn(1000, generator=rank_generator(1))
        exact = x.clone()
        dist.all_reduce(exact)
        exact.div_(divisor)
        sent = []
        for step in range(3):
            y, before = x.clone(), memory.sent_bytes
            assert commq.all_reduce(y, op, format="int8", schedule="plain", step=step, seed=step) is None
            sent.append(memory.sent_bytes - before)
            assert torch.equal(y, exact)
        assert len(set(sent)) == 1 and sent[0] > 0
        y = x.view(40, 25).clone().t()
        commq.all_reduce(y, op, format="int8", schedule="plain")
        assert torch.equal(y.t().reshape(-1), exact), "it is not contiguous, and copied"
        coded = x.clone()
        commq.all_reduce(coded, op, format="int8", schedule="two_shot")
        assert not torch.equal(coded, exact)
        with pytest.raises(ValueError, match="answer_residual"):
            commq.all_reduce(x.clone(), op, format="int8", schedule="plain", answer_residual=torch.zeros(1))
    shortcuts = [value for key, value in memory.notes.items() if key[0] == "call"]
    assert [each.divisor for each in shortcuts] == [1, world_size]


def test_what_needs_the_host_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a measurement cannot be captured in a CUDA graph: make the same call once"):
        time_call(lambda: None, torch.device("cuda"))
    time_call(lambda: None, torch.device("cpu"))
    state = commq.HookState("int4", transport=Recorder())
    with pytest.raises(RuntimeError, match=r"commq's hook of DDP cannot be captured .*two_shot"):
        commq.comm_hook(state, SimpleNamespace(buffer=lambda: SimpleNamespace(device=torch.device("cuda"))))


@thread_ranks(2, 3)
def test_plain_sums_in_the_format_that_is_asked_for():
    x = torch.randn(1003, generator=rank_generator(4))
    own = x.bfloat16()
    dist.all_reduce(own)
    exact = x.clone()
    dist.all_reduce(exact)
    for _ in range(3):
        found, kept = x.clone(), x.clone()
        commq.all_reduce(found, dist.ReduceOp.AVG, format="bf16", schedule="plain")
        assert torch.equal(found, torch.div(own, dist.get_world_size()).float())
        commq.all_reduce(kept, format="fp32", schedule="plain")
        assert torch.equal(kept, exact)


@thread_ranks(2)
def test_a_residual_is_sent_and_nothing_is_lost_whatever_is_chosen():
    for schedule in ("auto", "plain", "one_shot", "two_shot"):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1000, generator=rank_generator(1)).to(dtype)
            residual = torch.randn(1000, generator=rank_generator(2)) / 100
            inputs = x.to(torch.float64) + residual
            sent = x.clone()
            commq.all_reduce(sent, format="int8", answer="fp32", schedule=schedule, residual=residual)
            left = inputs - residual
            rows = [torch.empty_like(left) for _ in range(2)]
            dist.all_gather(rows, left)
            exact = rows[0] + rows[1]
            # x + residual, the new residual and the sum are rounded to fp32, the result to the tensor's dtype.
            slack = 2.0**-22 * float(inputs.abs().max()) * 2 + torch.finfo(dtype).eps * exact.abs()
            assert bool(((sent - exact).abs() <= slack).all()), schedule


def plain_in_bfloat16():
    """A megabyte takes 1 ms on the link, 0.6 ms in codecs: two_shot would beat a plain sum of fp32, but not of bf16."""
    moves, codecs = Curve(((0, 0), (10**6, 10**6))), Curve(((0, 0), (10**6, 6 * 10**5)))
    link.remember = lambda transport, key, find: codecs if key[0] == "codecs" else moves
    x = torch.randn(12 << 20, generator=rank_generator(1))
    own = x.bfloat16()
    dist.all_reduce(own)
    commq.all_reduce(x, format="bf16")
    return set(picked_of(memory_of(dist.group.WORLD))), torch.equal(x, own.float())


def picked_of(memory):
    return [value for key, value in memory.facts.items() if key[0] == "picked"]


def test_plain_counts_with_the_bytes_it_sends():
    assert run_processes(plain_in_bfloat16, 2) == [({"plain"}, True)] * 2


@thread_ranks(2)
def test_lengths_that_never_repeat_are_not_measured_anew_and_kept_for_ever(monkeypatch):
    monkeypatch.setattr("commq.collectives.memory.NOTES", 16)
    memory = memory_of(dist.group.WORLD)
    for numel in range(960, 1024):
        x = torch.ones(numel)
        commq.all_reduce(x, format="int8")
        assert torch.equal(x, torch.full((numel,), 2.0))
        if numel == 960:
            facts = dict(memory.facts)
    assert memory.facts == facts and len(picked_of(memory)) == 1 and len(memory.notes) <= 16


def test_two_hop_where_ranks_share_a_link():
    """4 hosts of 8: a flat exchange sends 8 times as much between hosts."""
    hosts = Hosts(tuple(rank // 8 for rank in range(32)))
    shared = line(100_000, GIGABIT // 8)
    costs = costs_at(GIGABIT // 8, world_size=32)
    codecs = {
        "one_shot": costs.codecs["one_shot"],
        "two_shot": costs.codecs["two_shot"],
        "two_hop": costs.codecs["two_shot"],
    }
    moves = {"all": shared, "inside": line(10_000, 10 * GIGABIT), "between": shared}
    costs = replace(costs, moves=moves, codecs=codecs, hosts=hosts)
    assert choose(plans_of(1 << 26, world_size=32), costs) == "two_hop"
    # Hosts as near to each other as their own ranks: the third encoding is not worth it.
    near = {among: line(10_000, 10 * GIGABIT) for among in moves}
    near["all"] = line(10_000, 40 * GIGABIT)
    assert choose(plans_of(1 << 26, world_size=32), replace(costs, moves=near)) != "two_hop"
