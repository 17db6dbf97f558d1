"""FSDP2 between hosts: two hops, secondary shards, all-reduces of shards with feedback, and what each sends."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.ops import implementation
from commq.codecs.reference import Coding
from commq.collectives.hosts import Hosts
from commq.collectives.memory import memory_of
from commq.collectives.plan import Source, make_plan
from commq.collectives.schedule import run as run_schedule
from commq.collectives.sharded import ShardMessage, Strip, gather, leaving_bytes, scatter
from commq.collectives.transport import C10d
from fsdp_cases import Even, error, grid, line, loss, made, run, same_bits, same_on_all_ranks, shard, whole
from harness import rank_generator, thread_ranks
from numerics import mean_rounding

FOUR_BY_TWO = (0, 0, 1, 1, 2, 2, 3, 3)
PLACES = {4: [(0, 0, 1, 1), (0, 1, 0, 1)], 8: [FOUR_BY_TWO, (0, 1, 1, 0, 2, 3, 3, 2), (0, 0, 0, 0, 1, 1, 1, 1)]}


def message(strips, sources, hosts, divisor=1.0):
    transport = C10d()
    plan = make_plan(tuple(sources), world_size=transport.world_size)
    return ShardMessage(plan, strips, transport, implementation("auto", strips[0].x.device), hosts, divisor)


def bound_of(inputs_WC, hosts, inside, fmt):
    """The bound of both hops: each rank's numbers within a host, then each host's sum."""
    bound = torch.zeros(inputs_WC.shape[1])
    for members in map(list, hosts.members):
        lost = sum(error_bound(x, inside) for x in inputs_WC[members])
        bound += lost + error_bound(inputs_WC[members].sum(dim=0).abs() + lost, fmt)
    return bound


@thread_ranks(4, 8)
def test_exchanges_stay_within_their_bounds():
    """Coded and raw strips in one message, in both hops; every rank's part is the sum, every gather the same bits."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    int8, int4, bf16 = (commq.get_format(name) for name in ("int8", "int4", "bf16"))
    for placed in PLACES[world_size]:
        hosts = Hosts(placed)
        for inside in (int8, int4, bf16):
            inputs = [torch.empty(world_size, 384) for _ in range(world_size)]
            own = torch.randn(world_size, 384, generator=rank_generator(7)) * (1000.0 if rank == 1 else 1.0)
            dist.all_gather(inputs, own)
            sources = [
                Source(own.numel(), torch.float32, int4, int4, 128, inside),
                Source(world_size * 5, torch.float32, bf16, bf16),
            ]
            outs = [torch.empty(384), torch.empty(5)]
            strips = [Strip(own.view(-1), outs[0], Coding()), Strip(own[:, :5].reshape(-1), outs[1], Coding())]
            run_schedule(scatter(message(strips, sources, hosts, float(world_size))))
            mine = torch.stack(inputs)[:, rank]
            exact = mine.to(torch.float64).mean(dim=0)
            rounding = mean_rounding(mine)
            for out, x, *formats in ((outs[0], mine, inside, int4), (outs[1], mine[:, :5], bf16, bf16)):
                numel = out.numel()
                bound = bound_of(x, hosts, *formats) / world_size + rounding[:numel]
                assert bool(((out - exact[:numel]).abs() <= bound).all()), (placed, formats)

        results = []
        for each in (None, hosts):
            out = [torch.empty(world_size * 256), torch.empty(world_size * 3)]
            x = torch.randn(256, generator=rank_generator(3))
            sources = [
                Source(world_size * 256, torch.float32, int8, int8, 128),
                Source(world_size * 3, torch.float32, bf16, bf16),
            ]
            strips = [Strip(x, out[0], Coding()), Strip(x[:3].clone(), out[1], Coding())]
            run_schedule(gather(message(strips, sources, each)))
            assert same_on_all_ranks(out[0]) and same_on_all_ranks(out[1])
            results.append(out)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@thread_ranks(8)
def test_bytes_that_leave_a_host():
    """4 hosts of 2: the default sends <= 0.40 of what FSDP2 sends all in bf16, with secondary shards <= 0.25."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def leaving(recipe, steps):
        model = shard(made(Wide), recipe, mesh=line(FOUR_BY_TWO), mp_policy=policy, reshard_after_forward=True)
        for step in range(steps):
            loss(model, step).backward()
        return commq.handle_of(model).stats().leaving_bytes

    # A ring sends (W - 1) shards in each of two gathers and a reduction; per host one rank's links leave it.
    rows = {each: -(-numel // 8) for each, numel in ((p, p.numel()) for p in made(Wide).parameters())}
    plain = 2 * 3 * 7 * sum(rows.values())
    for recipe, limit in (("full-shard", 0.40), (commq.recipe("full-shard", secondary=True), 0.25)):
        host = 2 * (leaving(recipe, 2) - leaving(recipe, 1))
        assert 0 < host <= limit * plain, (recipe, host / plain)
    # Weights as they are: two gathers of 2 bytes, flat, to six ranks on other hosts each; gradients in two hops.
    found = 2 * (leaving("tlq-hs", 2) - leaving("tlq-hs", 1))
    assert 2 * 2 * 2 * 6 * sum(rows.values()) < found < plain * 2


class Wide(Even):
    """Nearly all of it matrices of a unit's multiples."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in range(2))
        self.first, self.head = torch.nn.Linear(37, 512), torch.nn.Linear(512, 8)


@thread_ranks(4)
def test_between_hosts():
    exact = run(None, steps=1, mesh=line()).grads[0]
    raw = commq.recipe("hybrid-shard", format="fp32", inside="fp32", feedback="none")
    for recipe, limit in ((raw, 1e-6), ("hybrid-shard", 0.2)):
        found = run(recipe, mesh=grid(2), steps=3)
        assert error(found.grads[0], exact) < limit
        assert all(same_on_all_ranks(tensor) for tensor in found.parameters.values())
        same_bits(run(recipe, mesh=grid(2), steps=3), found)
    stats = found.handle.stats()
    assert stats.residual_norm > 0 and 0 < stats.leaving_bytes < stats.sent_bytes
    between = memory_of(found.handle.units[""].between.group).sent_bytes
    assert between == sum(each.between.traffic.sent for each in found.handle.units.values())


@thread_ranks(4)
def test_accumulating_shards_without_an_all_reduce():
    """set_requires_all_reduce(False): shards wait, and are reduced between hosts once; set_gradient_divide_factor."""
    recipe = commq.recipe("hybrid-shard", format="fp32", inside="fp32", feedback="none")
    once, twice = (shard(made(), recipe, mesh=grid(2)) for _ in range(2))
    for step in range(2):
        once.set_requires_all_reduce(step == 1)
        (loss(once, step) / 2).backward()
        (loss(twice, step) / 2).backward()
    found, expected = ({name: whole(p.grad) for name, p in model.named_parameters()} for model in (once, twice))
    assert error(found, expected) < 1e-6
    sent = [sum(each.between.traffic.sent for each in commq.handle_of(m).units.values()) for m in (once, twice)]
    assert 2 * sent[0] == sent[1]

    summed = shard(made(), recipe, mesh=grid(2))
    for module in summed.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    loss(summed, 0).backward()
    mean = run(recipe, mesh=grid(2), steps=1).grads[0]
    assert error({name: whole(p.grad) / 4 for name, p in summed.named_parameters()}, mean) < 1e-6


@thread_ranks(4)
def test_feedback_of_both_hops():
    """The sum over steps of what arrives follows the sum of the gradients: what was lost comes later."""

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64, 256))

        def forward(self, x):
            return (self.weight * x).sum()

    x = torch.randn(64, 256, generator=rank_generator(11))
    exact = x.clone()
    dist.all_reduce(exact)
    exact /= 4
    classic = {"rule": "classic", "storage": "fp32"}
    errors = {}
    for name, options in {
        "none": {"feedback": "none"},
        "both": {"feedback": classic, "answer_feedback": classic},
    }.items():
        recipe = commq.recipe("int4", inside="int4", schedule="two_hop", **options)
        model = shard(Fixed(), recipe, mesh=line((0, 0, 1, 1)))
        total = torch.zeros(64, 256)
        for _ in range(16):
            model(x).backward()
            total += model.weight.grad.full_tensor()
            model.weight.grad = None
        errors[name] = error({"w": total / 16}, {"w": exact})
    assert errors["both"] < errors["none"] / 8


@thread_ranks(4)
def test_refusals():
    with pytest.raises(ValueError, match="equally many neighbouring ranks"):
        shard(made(), "zero++", mesh=line((0, 1, 0, 1)))
    with pytest.raises(ValueError, match="secondary shards stay on the 2 ranks of a host"):
        shard(made(), "zero++", mesh=line((0, 0, 1, 1)), reshard_after_forward=False)
    with pytest.raises(ValueError, match="expected one, or two with names"):
        shard(made(), "int8", mesh=dist.device_mesh.init_device_mesh("cpu", (2, 2)))
    with pytest.raises(ValueError, match="answer_feedback is not kept between hosts"):
        shard(made(), commq.recipe("doublesqueeze"), mesh=grid(2))
    model = torch.distributed.fsdp.fully_shard(made(), mesh=grid(2))
    with pytest.raises(ValueError, match="native HSDP's all-reduce cannot be replaced"):
        commq.attach.fsdp.attach(model, commq.recipe("int8"), None)
    hosts = Hosts(FOUR_BY_TWO)
    assert leaving_bytes(100, hosts, 0, hops=True) == 300
    assert leaving_bytes(100, hosts, 0, hops=False) == 600
