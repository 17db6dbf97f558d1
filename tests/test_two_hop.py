"""Two-hop on thread ranks that believe they are on several hosts, neighbours or not."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS, get_format
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation, rotate, unrotate
from commq.collectives import hosts as hosts_module
from commq.collectives.all_reduce import answer_residual_numel
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.group import transport_of
from commq.collectives.hosts import Hosts, find_hosts
from commq.collectives.message import ANSWER_STREAM, Operand, host_stream, make_messages, send_stream
from commq.collectives.plan import Source, make_plan
from commq.collectives.schedule import run
from commq.collectives.two_hop import sent_bytes, two_hop
from harness import process_ranks, rank_generator, run_processes, thread_ranks
from numerics import paired
from placements import COUNTS, PLACES, clusters, dealt, neighbours, pretend, to_and_fro
from test_schedules import piece_bytes

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
RANKS = 4, 6, 8, 12, 16

all_reduce = partial(commq.all_reduce, schedule="two_hop")


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return rows


def default_inside(fmt):
    """int8 where the format has fewer bits."""
    return get_format("int8", block=fmt.block) if fmt.kind != "raw" and fmt.bits < 8 else fmt


def lossy(x, fmt):
    return commq.decode(commq.encode(x, fmt))


def by_definition(inputs, hosts, fmt, inside, answer, divisor, feedback=None):
    """(result, what the answer lost) of the schedule on whole vectors: each sum in fp32, in order."""
    sums = [in_order([lossy(inputs[rank], inside) for rank in ranks]) for ranks in hosts.members]
    total = in_order([lossy(each, fmt) for each in sums]) / divisor
    total = total if feedback is None else total + feedback
    result = lossy(total, answer)
    return result, total - result


def in_order(rows):
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


@PLACES
@thread_ranks(*RANKS)
def test_ones_average_to_exactly_one(place):
    for _ in clusters(place):
        for name, numel in paired(FORMATS, (1, 127, 1003), RANKS.index(dist.get_world_size())):
            tensor = torch.ones(numel)
            all_reduce(tensor, AVG, format=name)
            assert bool((tensor == 1.0).all()), (name, numel)
        tensor = torch.ones(70_001)
        all_reduce(tensor, format="int4")
        assert bool((tensor == dist.get_world_size()).all())


@PLACES
@thread_ranks(*RANKS)
def test_has_the_bits_of_its_definition_on_all_ranks(place):
    for hosts in clusters(place):
        for name, fmt in FORMATS.items():
            numel = {"int4": 70_001}.get(name, 1003)
            x = torch.randn(numel, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
            result = x.clone()
            all_reduce(result, AVG, format=name)
            if dist.get_rank() == 0:
                inputs = [torch.randn(numel, generator=rank_of(1, rank)) * 10.0 ** (rank % 4 - 2) for rank in range_()]
                expected, _ = by_definition(inputs, hosts, fmt, default_inside(fmt), fmt, dist.get_world_size())
                assert torch.equal(result, expected), (name, hosts)
            assert all(torch.equal(row, result) for row in gather(result)), (name, hosts)


def range_():
    return range(dist.get_world_size())


def rank_of(seed, rank):
    """The generator that `rank_generator(seed)` is on another rank."""
    return torch.Generator().manual_seed((seed << 16) + rank)


@PLACES
@thread_ranks(4, 6, 8)
def test_error_is_within_the_bound(place):
    """The bound in the docstring of `two_hop`, for other formats inside, and each hop's own."""
    for hosts in clusters(place):
        for name, within, last in [(n, None, n) for n in FORMATS] + [
            ("sign", "bf16", "int8"),
            ("int2", "fp32", "int4"),
        ]:
            fmt, answer, world_size = FORMATS[name], FORMATS[last], dist.get_world_size()
            inside = default_inside(fmt) if within is None else FORMATS[within]
            numel = 1003
            x = torch.randn(numel, generator=rank_generator(2)) * 10.0 ** (dist.get_rank() % 4 - 2)
            x[501] *= 100
            inputs = torch.stack(gather(x))
            all_reduce(x, AVG, format=name, inside=within, answer=last)
            exact, error = inputs.to(torch.float64), torch.zeros(numel, dtype=torch.float64)
            for ranks in hosts.members:
                first = sum(error_bound(inputs[rank], inside) for rank in ranks)
                partial_sum = exact[list(ranks)].sum(dim=0)
                error += first + error_bound((partial_sum.abs() + first).to(torch.float32), fmt)
            mean, error = exact.mean(dim=0), error / world_size
            bound = error + error_bound((mean.abs() + error).to(torch.float32), answer)
            rounding = world_size * 2.0**-23 * (exact.abs().mean(dim=0) + error)
            assert bool(((x - mean).abs() <= bound + rounding).all()), (name, within, hosts)


@thread_ranks(6, 8)
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int4"},
        {"format": "sign", "answer": "int8", "inside": get_format("int8", block=32)},
        {"format": "int4", "rounding": "stochastic", "seed": 3, "step": 7},
        {"format": "int4", "inside": get_format("int8", block=16), "rounding": "stochastic"},
        {"format": "int4", "inside": "bf16", "rounding": "stochastic"},
        {"format": "int4", "rotation": 64, "rounding": "stochastic"},
        {"format": "bf16", "rounding": "stochastic"},
        {"format": "nvfp4", "answer": "bf16", "inside": "bf16"},
    ],
    ids=str,
)
def test_pieces_change_no_bit(options):
    for _ in clusters(to_and_fro):
        x = torch.randn(70_001, generator=rank_generator(3))
        whole, cut = x.clone(), x.clone()
        all_reduce(whole, AVG, **options)
        with piece_bytes(1 << 14):
            all_reduce(cut, AVG, **options)
        assert torch.equal(whole, cut)


@thread_ranks(6)
def test_a_list_has_the_bits_of_its_tensors_alone():
    for _ in clusters(to_and_fro):
        xs = [torch.randn(n, generator=rank_generator(n)) for n in (5000, 1, 300, 70_001)]
        xs[1] = xs[1].to(torch.bfloat16)
        together, alone = [x.clone() for x in xs], [x.clone() for x in xs]
        all_reduce(together, AVG, format="int4")
        for tensor in alone:
            all_reduce(tensor, AVG, format="int4")
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@thread_ranks(8)
def test_not_finite_on_one_rank_is_nan_on_all():
    for _ in clusters(dealt):
        for value in (float("nan"), float("inf"), -float("inf")):
            tensor = torch.ones(1000)
            if dist.get_rank() == 5:
                tensor[130] = value
            all_reduce(tensor, AVG, format="int4")
            assert bool(tensor[128:256].isnan().all())
            assert bool((tensor[:128] == 1).all()) and bool((tensor[256:] == 1).all())


@thread_ranks(6)
@pytest.mark.parametrize("signs", [False, True])
def test_a_rotation_is_applied_once_and_undone_once(signs):
    rotation = Rotation(size=64, signs=signs)
    for hosts in clusters(dealt):
        x = torch.randn(1000, generator=rank_generator(4))
        pattern = rotation.sign_pattern(seed=0, step=0, device=x.device)
        rotated = gather(rotate(torch.nn.functional.pad(x, (0, 24)), rotation, pattern))
        expected, _ = by_definition(rotated, hosts, FORMATS["int4"], FORMATS["int8"], FORMATS["int4"], len(rotated))
        all_reduce(x, AVG, format="int4", rotation=rotation)
        assert torch.equal(x, unrotate(expected, rotation, pattern)[:1000])


@thread_ranks(8)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats():
    steps = 120
    for hosts in clusters(dealt):
        x = torch.randn(256, generator=rank_generator(5))
        inputs = torch.stack(gather(x))
        total = torch.zeros_like(x)
        for step in range(steps):
            result = x.clone()
            all_reduce(result, AVG, format="int4", rounding="stochastic", step=step)
            total += result
            if step == 0:
                again = x.clone()
                all_reduce(again, AVG, format="int4", rounding="stochastic", step=step)
                assert torch.equal(again, result)
        # An encoding's variance is at most step**2 / 4; a step is the largest value of a block over 127 or 7. What a
        # hop encodes exceeds the exact sum by one step of the hop before at most.
        world_size = dist.get_world_size()
        first = inputs.abs().max() / 127
        second = max(inputs[list(r)].sum(dim=0).abs().max() + len(r) * first for r in hosts.members) / 7
        third = (inputs.mean(dim=0).abs().max() + first + hosts.count * second / world_size) / 7
        variance = first**2 / 4 / world_size + hosts.count * second**2 / 4 / world_size**2 + third**2 / 4
        # 256 elements: the chance that a normal number is beyond 5 deviations is 6e-7 for each.
        assert float((total / steps - inputs.mean(dim=0)).abs().max()) < 5 * float(variance / steps) ** 0.5


def test_no_two_encodings_of_an_element_share_random_bits():
    streams = [ANSWER_STREAM, *map(send_stream, range(1024)), *map(host_stream, range(1024))]
    assert len(set(streams)) == len(streams)


@PLACES
@thread_ranks(4, 6)
def test_residuals_hold_what_their_hops_lose(place):
    numel, world_size, rank = 1024, dist.get_world_size(), dist.get_rank()
    formats = {"format": get_format("sign", block=32), "answer": "int4", "inside": "int4"}
    inside, answer = FORMATS["int4"], FORMATS["int4"]
    for hosts in clusters(place):
        count = answer_residual_numel(numel, world_size=world_size, schedule="two_hop", **formats)
        own, last = torch.zeros(numel), torch.zeros(count)
        feedback = torch.zeros(numel)
        chunk = hosts.local_of[rank] * hosts.count + hosts.host_of[rank]
        for _ in range(3):
            x = torch.randn(numel, generator=rank_generator(6))
            h = x + own
            inputs = gather(h)
            expected, feedback = by_definition(inputs, hosts, formats["format"], inside, answer, world_size, feedback)
            all_reduce(x, AVG, residual=own, answer_residual=last, **formats)
            assert torch.equal(x, expected)
            assert torch.equal(own, h - lossy(h, inside))
            mine = feedback[chunk * count : (chunk + 1) * count]
            assert torch.equal(last[: mine.numel()], mine)


@thread_ranks(4)
@pytest.mark.parametrize("count", [1, 4])
def test_one_host_or_one_rank_on_each_is_two_shot(count):
    pretend(dealt(4, count))
    x = torch.randn(1003, generator=rank_generator(7))
    expected = x.clone()
    commq.all_reduce(expected, AVG, format="int4", schedule="two_shot")
    all_reduce(x, AVG, format="int4")
    assert torch.equal(x, expected)


@thread_ranks(3, 5)
def test_hosts_of_different_sizes_are_refused_on_every_rank():
    hosts = pretend(dealt(dist.get_world_size(), 2))
    tensor = torch.ones(1000)
    for async_op in (False, True):
        with pytest.raises(ValueError, match=r"2 hosts of \d, \d ranks, expected the same .* use schedule=.two_shot"):
            all_reduce(tensor, AVG, format="int4", async_op=async_op)
    assert bool((tensor == 1.0).all())  # nothing has moved
    with pytest.raises(ValueError, match="expected the same number"):
        sent_bytes(make_plan((Source(8, torch.float32, FORMATS["int4"], FORMATS["int4"]),), world_size=8), hosts)


# Processes


def reduce_on(keys):
    if keys:
        hosts_module.host_key = lambda: keys[dist.get_rank()]
    shares, transport = [], transport_of(None)
    share = transport.share
    transport.share = lambda value: shares.append(value) or share(value)
    hosts = find_hosts(transport)
    assert find_hosts(transport) is hosts and len(shares) == 1
    x = torch.randn(5000, generator=rank_generator(8))
    work = all_reduce(x, AVG, format="int4", async_op=True)
    work.wait()
    return hosts.host_of, x


def test_ranks_find_their_hosts():
    for keys, host_of in (("abba", (0, 1, 1, 0)), ("", (0, 0, 0, 0))):
        found, results = zip(*run_processes(reduce_on, 4, args=(keys,)), strict=True)
        assert set(found) == {host_of}
        assert all(torch.equal(result, results[0]) for result in results)
        inputs = [torch.randn(5000, generator=rank_of(8, rank)) for rank in range(4)]
        if keys:
            int4 = FORMATS["int4"]
            expected, _ = by_definition(inputs, Hosts(host_of), int4, default_inside(int4), int4, 4)
            assert torch.equal(results[0], expected)


@process_ranks(4)
def test_async_in_pieces():
    PIECE_BYTES["cpu"] = 1 << 14
    pretend(dealt(4, 2))
    xs = [torch.full((30_000,), float(dist.get_rank() + i)) for i in range(3)]
    works = [all_reduce(x, AVG, format="int4", async_op=True) for x in xs]
    for i, (x, work) in enumerate(zip(xs, works, strict=True)):
        assert work.wait() and bool((x == i + 1.5).all())


# Bytes


def plan_of(numel, world_size, fmt="int4", inside="int8", dtype=torch.float32):
    return make_plan((Source(numel, dtype, FORMATS[fmt], FORMATS[fmt], inside=FORMATS[inside]),), world_size=world_size)


def test_a_host_sends_at_most_27_hundredths_of_what_bf16_sends():
    """4 hosts of 2 ranks, int8 inside and int4 between them; a bf16 ring's host sends 2 (n - 1) / n of its bytes."""
    numel, hosts = 1 << 24, neighbours(8, 4)
    inside, between = sent_bytes(plan_of(numel, 8), hosts)
    bf16_ring = 2 * 3 * 2 * numel // 4
    assert 100 * 2 * between <= 27 * bf16_ring
    assert 2 * between == 2 * 3 * numel // 4 * 17 // 32  # 4.25 bits an element
    assert inside == numel // 2 * 33 // 32 + numel // 2 * 17 // 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_ever_grows(dtype):
    for world_size, counts in COUNTS.items():
        for hosts in (neighbours(world_size, count) for count in (1, *counts, world_size)):
            for numel in (1, 15, 17, 100, 127, 129, 1003, 4096, 100_003):
                raw = "fp32" if dtype == torch.float32 else "bf16"
                plain = sent_bytes(plan_of(numel, world_size, raw, raw, dtype), hosts)
                for name in FORMATS:
                    for inside in ("int8", "bf16", "fp32"):
                        sent = sent_bytes(plan_of(numel, world_size, name, inside, dtype), hosts)
                        assert sent[0] <= plain[0] and sent[1] <= plain[1], (name, inside, numel, hosts)


class Counting:
    """A transport that counts the bytes it sends to other ranks: of the own host, and of others."""

    def __init__(self, transport, hosts):
        self.transport, self.rank, self.world_size = transport, transport.rank, transport.world_size
        self.memory, self.hosts, self.sent = transport.memory, hosts, [0, 0]

    def all_to_all(self, send_WS, recv_WS):
        splits = [send_WS.shape[1]] * self.world_size
        return self.all_to_all_v(send_WS.view(-1), recv_WS.view(-1), splits, splits)

    def all_gather(self, row_S, out_WS):
        return self.all_to_all(row_S.expand_as(out_WS).contiguous(), out_WS)

    def all_to_all_v(self, send, recv, send_splits, recv_splits, *, longest=0):
        for to, nbytes in enumerate(send_splits):
            if to != self.rank:
                self.sent[self.hosts.host_of[to] != self.hosts.host_of[self.rank]] += nbytes
        return self.transport.all_to_all_v(send, recv, send_splits, recv_splits)


@PLACES
@thread_ranks(4, 6, 8)
def test_sends_the_bytes_that_it_says(place):
    world_size = dist.get_world_size()
    for count in (1, *COUNTS[world_size], world_size):
        hosts = pretend(place(world_size, count))
        xs = [torch.ones(5000), torch.ones(77, dtype=torch.bfloat16), torch.ones(3)]
        sources = [Source(x.numel(), x.dtype, FORMATS["int4"], FORMATS["sign"], inside=FORMATS["int8"]) for x in xs]
        plan = make_plan(tuple(sources), world_size=world_size)
        transport = Counting(transport_of(None), hosts)
        for message in make_messages([plan], [Operand(x, x, Coding()) for x in xs], transport, average=True):
            run(two_hop(message))
        assert tuple(transport.sent) == sent_bytes(plan, hosts)
        assert all(bool((x == 1.0).all()) for x in xs)
