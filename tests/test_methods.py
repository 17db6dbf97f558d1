"""Recipes of published methods, each by the property that its paper is about. EDEN has test_eden.py."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs import reference
from commq.codecs.formats import LEVEL_FORMATS, get_format
from commq.codecs.levels import dynamic_tree, relative_error
from commq.codecs.ops import decode, encode
from commq.codecs.reference import Coding
from commq.codecs.wire import Layout
from commq.collectives.all_reduce import answer_residual_numel
from commq.policy.levels import Adapt, histogram, variance
from commq.policy.widths import Widths
from harness import thread_ranks
from placements import neighbours, pretend

AVG = dist.ReduceOp.AVG


def normal(numel, seed=0):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def skewed(numel, seed=0):
    """One sided, with a heavy tail: mean 0.4 of the deviation."""
    return normal(numel, seed).abs() ** 3


def reduce(recipe, x, step=0, **residuals):
    """The mean of x over ranks, as the recipe sends it."""
    x = x.clone()
    commq.all_reduce(
        x,
        op=AVG,
        format=recipe.format,
        answer=recipe.answer,
        inside=recipe.inside,
        schedule=recipe.schedule,
        rounding=recipe.rounding,
        rotation=recipe.rotation,
        seed=1,
        step=step,
        **residuals,
    )
    return x


def gather(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


# All of them


@thread_ranks(4)
def test_zeros_stay_zero_and_all_ranks_agree():
    pretend(neighbours(4, 2))
    for name in commq.recipes():
        recipe = commq.recipe(name)
        assert torch.equal(reduce(recipe, torch.zeros(5000)), torch.zeros(5000)), name
        rows = gather(reduce(recipe, normal(5000, dist.get_rank())))
        assert (rows == rows[0]).all(), name


@pytest.mark.parametrize("name", ["qsgd", "tlq-hs", "alq3", "amq3", "marsit"])
@thread_ranks(4)
def test_unbiased(name):
    """The mean over many steps is the mean of the ranks' inputs: squared and summed, and summed, its offset is within 5
    deviations of none (those of 1024 nearly independent elements).
    """
    pretend(neighbours(4, 2))
    recipe, trials = commq.recipe(name), 100
    rows = torch.stack([skewed(1024, rank) if name != "marsit" else normal(1024, rank) for rank in range(4)])
    # Marsit merges the ranks' signs without a bias; the signs themselves are rounded to nearest.
    sent = [decode(encode(row, recipe.format)) for row in rows] if name == "marsit" else list(rows)
    exact = torch.stack(sent).double().mean(dim=0)
    draws = torch.stack([reduce(recipe, rows[dist.get_rank()], step) for step in range(trials)]).double()
    off, deviation = draws.mean(dim=0) - exact, draws.std(dim=0) / math.sqrt(trials)
    assert off.square().sum() <= (1 + 5 * math.sqrt(2 / 1024)) * deviation.square().sum()
    assert off.sum().abs() <= 5 * deviation.norm()


# Error feedback


def stream(recipe, x_TN, feedback=True):
    """What one rank sends of x_0, x_1, ... by the recipe's first hop, with its feedback, and the residuals after it."""
    numel = x_TN.shape[1]
    layout, rule = Layout(recipe.format, numel), recipe.feedback
    stored = torch.zeros(numel, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[rule.storage])
    scales = torch.zeros(layout.chunk_blocks) if rule.storage == "int8" else None
    wire, sent, residuals = torch.empty(1, layout.nbytes, dtype=torch.uint8), [], []
    for step, x in enumerate(x_TN):
        if rule.resets(step):
            stored.zero_()
        coding = Coding(rounding=recipe.rounding, seed=1, step=step)
        kept = {"residual_N": stored, "residual_scales_G": scales, "decay": rule.weight} if feedback else {}
        reference.encode_bucket(x, wire, layout, coding, **kept)
        out = torch.empty(numel)
        reference.decode_bucket(wire, layout, out, coding)
        sent.append(out)
        residuals.append(reference.load_residual(stored, scales, recipe.format.block))
    return torch.stack(sent), torch.stack(residuals)


@pytest.mark.parametrize("name", ["loco", "loco-two-hop"])
def test_loco_removes_the_bias_of_rounding(name):
    """Of a gradient that changes little, the sum of what is sent loses 5 times less with feedback than without, and a
    single step is not much worse: the residual is averaged, and kept in 8 bits.
    """
    recipe, steps = commq.recipe(name), 200
    mean = 0.2 * normal(2048)
    x_TN = mean + 0.05 * normal(steps * 2048, 1).view(steps, 2048)
    total = x_TN.double().sum(dim=0)
    (with_it, _), (without, _) = stream(recipe, x_TN), stream(recipe, x_TN, feedback=False)
    bias, plain = ((sent.double().sum(dim=0) - total).norm() / total.norm() for sent in (with_it, without))
    assert bias < plain / 5, (bias, plain)
    once, plainly = ((sent - x_TN).norm() / x_TN.norm() for sent in (with_it, without))
    assert once < 1.5 * plainly


def test_loco_resets():
    """Before step 512 the residual is zeroed: that step sends what a first step would."""
    recipe = commq.recipe("loco")
    x_TN = normal(256).expand(514, 256)
    sent, _ = stream(recipe, x_TN)
    assert torch.equal(sent[512], sent[0]) and not torch.equal(sent[511], sent[0])


@pytest.mark.parametrize("name", ["doublesqueeze", "onebit-sgd"])
@thread_ranks(3)
def test_two_residuals_lose_nothing(name):
    """sum of results + mean of the ranks' residuals + the owners' == sum of the means of inputs."""
    recipe, numel, steps = commq.recipe(name), 3000, 12
    residual = torch.zeros(numel)
    answer = torch.zeros(answer_residual_numel(numel, format=recipe.format, world_size=3))
    results, inputs = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for step in range(steps):
        x = skewed(numel, 10 * step + dist.get_rank())
        inputs += gather(x).double().mean(dim=0)
        results += reduce(recipe, x, step, residual=residual, answer_residual=answer)
    kept = gather(residual).double().mean(dim=0) + gather(answer).view(-1)[:numel].double()
    # One float32 rounding an addition, of numbers no larger than the residuals became.
    slack = steps * 8 * 2.0**-24 * max(float(kept.abs().max()), float(inputs.abs().max()))
    assert ((results + kept - inputs).abs() <= slack).all()
    assert kept.norm() > 0.1 * inputs.norm() / steps


def test_ef_signsgd_is_the_papers_contraction():
    """|D - p|**2 == (1 - |p|_1**2 / (B |p|_2**2)) |p|**2 in every block (Lemma 8), and residuals stay bounded."""
    recipe = commq.recipe("ef-signsgd", format=get_format("sign", scale="fp32"))
    p = skewed(64 * 128).view(64, 128) * torch.randint(0, 2, (64, 128)).mul(2).sub(1)
    arrived = decode(encode(p.view(-1), recipe.format)).view(64, 128).double()
    exact = p.double()
    share = 1 - exact.abs().sum(dim=1).square() / (128 * exact.square().sum(dim=1))
    lost = (arrived - exact).square().sum(dim=1) / exact.square().sum(dim=1)
    assert ((lost - share).abs() <= 2.0**-20).all()
    # Lemma 3: E|e|**2 <= 4 (1 - d) / d**2 * max|g|**2 with the contraction 1 - d of this stream.
    x_TN = normal(300 * 1024).view(300, 1024)
    _, residuals = stream(recipe, x_TN)
    h = (x_TN[1:] + residuals[:-1]).view(-1, 8, 128).double()
    d = (h.abs().sum(dim=2).square() / (128 * h.square().sum(dim=2))).min()
    most = residuals.view(-1, 8, 128).square().sum(dim=2).max()
    assert most <= 4 * (1 - d) / d**2 * x_TN.view(-1, 8, 128).square().sum(dim=2).max()


def test_onebit_sgd_decodes_the_means_of_both_signs():
    fmt = get_format("means")
    x = skewed(5 * 256, 3) - 0.5
    found, exact = decode(encode(x, fmt)).view(5, 256), x.view(5, 256)
    for row, own in zip(found, exact, strict=True):
        for of_sign in (own >= 0, own < 0):
            mean = own[of_sign].double().mean()
            assert ((row[of_sign] - mean).abs() <= mean.abs() * 2.0**-8).all()
    # Two values fit no worse than one magnitude: what signs of this block would lose.
    sign = decode(encode(x, get_format("sign", block=256))).view(5, 256)
    assert (((found - exact).square().sum(1)) <= (sign - exact).square().sum(1) * (1 + 2.0**-6)).all()


# Sums of integers


@thread_ranks(2)
def test_thc_decodes_an_affine_function_of_the_sum():
    """Opposite gradients cancel exactly, and equal ones arrive as one of them would: levels are added as integers."""
    recipe, x = commq.recipe("thc", rounding="nearest"), normal(4096, 5)
    assert torch.equal(reduce(recipe, x if dist.get_rank() else -x), torch.zeros(4096))
    twice, half = reduce(recipe, x), reduce(recipe, x * 0.5)
    assert torch.equal(twice, half * 2.0)


# Levels


def test_dynamic_tree_is_finer_near_zero():
    """255 values from -1 to 1; 2**(6 - z) of each sign in the decade below 10**-z; errors follow."""
    levels = dynamic_tree()
    assert len(levels) == 255 and levels == tuple(-level for level in reversed(levels)) and 0.0 in levels
    for zeros in range(7):
        assert sum(10.0 ** -(zeros + 1) < level <= 10.0**-zeros for level in levels) == 1 << (6 - zeros)
    x = torch.logspace(-6, 0, 1000).float()
    arrived = decode(encode(torch.cat((x, torch.ones(1))), get_format("dynamic8", block=1024)))[:1000]
    decade = (-torch.log10(x)).floor()
    # Half a step, and half of that more at the top, where 0.993 became 1.
    bound = 1.5 * 0.45 * 10.0**-decade / 2.0 ** (6 - decade) * (1 + 2.0**-20)
    assert ((arrived - x).abs() <= bound)[decade < 7].all()


@pytest.mark.parametrize("name", ["alq3", "amq3"])
def test_adapted_levels_lose_less(name):
    """On skewed data the variance falls by a third or more, as the histogram says and as it is measured."""
    recipe, x = commq.recipe(name), skewed(1 << 16)
    weights = histogram(x, recipe.format).tolist()
    adapted = recipe.adapt.adapted(recipe.format, weights)
    assert variance(adapted.levels, weights) < variance(recipe.format.levels, weights) * 2 / 3

    def lost(fmt):
        return sum(
            (decode(encode(x, fmt, rounding="stochastic", step=k)) - x).double().square().sum() for k in range(4)
        )

    assert lost(adapted) < lost(recipe.format) * 2 / 3


def test_alq_levels_are_best_one_by_one():
    """Coordinate descent ends where no level alone can be moved to any gain."""
    fmt = get_format("alq3")
    weights = histogram(skewed(1 << 14), fmt).tolist()
    found = Adapt(method="alq").adapted(fmt, weights)
    least = variance(found.levels, weights)
    positive = [level for level in found.levels if level > 0]
    assert all(a < b for a, b in pairwise(positive)) and positive[-1] == 1.0
    for j in range(len(positive) - 1):
        for factor in (0.97, 1.03):
            moved = [level * factor if i == j else level for i, level in enumerate(positive)]
            table = [*(-level for level in reversed(moved)), 0.0, *moved]
            assert variance(table, weights) >= least * (1 - 1e-4)


def test_histograms_do_not_depend_on_order_or_on_what_is_not_finite():
    fmt = get_format("alq3")
    x = skewed(64 * fmt.block)
    blocks = x.view(64, -1)
    assert torch.equal(histogram(x, fmt), histogram(blocks.flip(0).reshape(-1), fmt))
    with_nan = torch.cat((blocks, torch.full((1, fmt.block), torch.nan))).view(-1)
    assert torch.equal(histogram(with_nan, fmt), histogram(x, fmt))
    assert histogram(torch.zeros(1000), fmt).sum() == 0
    assert Adapt().adapted(fmt, [0.0] * 512) == fmt


def test_when_levels_are_adapted():
    assert [step for step in range(30_001) if Adapt().due(step)] == [100, 2000, 10_000, 20_000, 30_000]
    with pytest.raises(ValueError, match="expected 'alq' or 'amq'"):
        Adapt(method="lloyd")
    for recipe, says in (
        ({"name": "int4", "adapt": Adapt()}, "expected a table of levels"),
        ({"name": "alq3", "rounding": "nearest"}, "rounding='stochastic'"),
        ({"name": "amq3", "adapt": Adapt(method="alq")}, "expected a table with the level 0"),
    ):
        with pytest.raises(ValueError, match=says):
            commq.recipe(recipe)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_widths_are_the_fewest_bits_that_keep_the_error_below_mu(bits):
    """A pure function of squares: with equal gradients on W ranks, d / W <= mu decides."""
    fmt, world = get_format("eden4"), 4
    local = 100.0
    mean = local * (1 + relative_error(4) / world)  # as measured in 4 bits
    for factor, expected in ((1.001, bits), (0.999, min(bits + 1, 4))):
        chosen = Widths(mu=relative_error(bits) / world * factor).adapted(fmt, [local, mean], world)
        assert chosen == get_format(f"eden{expected}")
    # The mean vanishes beside what ranks send, or nothing is known of it: as many bits as there are.
    assert Widths().adapted(fmt, [local, 0.0], world) == get_format("eden4")


def test_every_named_table_runs_from_minus_one_to_one():
    for fmt in LEVEL_FORMATS.values():
        assert fmt.levels[0] == -1.0 and fmt.levels[-1] == 1.0 and len(fmt.levels) <= 1 << fmt.bits
