"""estimate_memory against what a real step takes."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commq
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.memory import Memory
from harness import process_ranks

RECIPES = (
    *("int4", "onebit", "doublesqueeze", "qsgd", "bf16"),
    commq.recipe("int4", feedback=commq.Feedback(rule="classic", storage="int8")),
)


def model(width):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(12)))


@contextmanager
def lent():
    """A list that grows by the bytes that the group's memory has lent, whenever they change."""
    take, give, counts = Memory.take, Memory.give, [0]

    def taken(memory, rows, nbytes, device):
        counts.append(counts[-1] + rows * nbytes)
        return take(memory, rows, nbytes, device)

    def given(memory, *buffers):
        counts.append(counts[-1] - sum(buffer.numel() for buffer in buffers))
        give(memory, *buffers)

    Memory.take, Memory.give = taken, given
    try:
        yield counts
    finally:
        Memory.take, Memory.give = take, give


@process_ranks(2, 3)
@pytest.mark.parametrize("width", [256, 250], ids=["in place", "copied"])
def test_estimate_is_what_a_step_takes(width, monkeypatch):
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1 << 18)
    for recipe in RECIPES:
        estimate = commq.estimate_memory(model(width), recipe, dist.get_world_size(), bucket_cap_mb=0.6)
        ddp = DistributedDataParallel(model(width), bucket_cap_mb=0.6)
        handle = commq.register(ddp, recipe)
        for _ in range(3):  # DDP rebuilds its buckets, and then a step as all others
            with lent() as counts:
                ddp(torch.randn(4, width)).square().mean().backward()
        assert counts[-1] == 0
        buckets = [known.bucket for known in handle._layouts._known.values()]
        coded = [group for bucket in buckets for group in bucket.groups if hasattr(group, "residual")]
        residual = sum(
            t.nbytes for g in coded if g.residual for t in (g.residual.values, g.residual.scales) if t is not None
        )
        answer = sum(g.answer_residual.nbytes for g in coded if g.answer_residual is not None)
        tables = sum(t.nbytes for g in coded for b in (g.blocks, g.answer_blocks) if b for t in (b.ids_G, b.valid_G))
        assert estimate.residual == pytest.approx(residual, rel=0.05)
        assert estimate.answer_residual == pytest.approx(answer, rel=0.05)
        assert estimate.tables == pytest.approx(tables, rel=0.05)
        if width == 256:  # copies are not lent by the group's memory
            copies = sum(raw.x_N.nbytes for known in handle._layouts._known.values() for raw in known.laid.raw)
            assert estimate.wire == pytest.approx(max(counts) + copies, rel=0.05), recipe
        assert estimate.total == estimate.residual + estimate.answer_residual + estimate.tables + estimate.wire


@pytest.mark.parametrize("recipe", commq.recipes())
def test_every_recipe_has_an_estimate(recipe):
    """On tensors without data. What travels is that of a bucket or two, each a layer of 4 MiB, not of all 12."""
    with torch.device("meta"):
        large = model(1024)
    flat, hosts = (commq.estimate_memory(large, recipe, 8, bucket_cap_mb=1.0, hosts=hosts) for hosts in (1, 2))
    feeds_back = commq.recipe(recipe).feedback.rule != "none"
    assert (flat.residual > 0) == feeds_back and flat.residual == hosts.residual
    assert 0 < flat.wire < 4 * 2 * 2**20 * 4


def test_nothing_is_sent_alone():
    assert commq.estimate_memory(model(64), "int4", 1).total == 0
    with pytest.raises(ValueError, match="world_size=3, hosts=2"):
        commq.estimate_memory(model(64), "int4", 3, hosts=2)
