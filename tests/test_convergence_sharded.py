"""bench/convergence.py on sharded training: ranks in one process give the bits of commq.fully_shard in processes."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils import clip_grad_norm_

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import commq
from commq.train.config import ModelConfig, OptimizerConfig
from commq.train.model import GPT, next_byte_loss
from commq.train.optimizer import make_optimizer
from convergence import RECIPES
from convergence_report import DIRECT, SHARDED_GATES, report
from convergence_run import Run, Setting
from fsdp_cases import grid, line, shard, whole
from harness import run_processes
from recipe_text import read_recipe, split_recipes
from sharded_replicas import ShardedReplicas

STEPS, ROWS, HOSTS_OF = 3, 2, [0, 0, 1, 1]
MODEL = ModelConfig(layers=2, dim=50, heads=5, context=16)
"""Rows of no parameter but the embedding and the head can be shared out evenly by four ranks."""
FLAT = (
    "fp32",
    "full-shard",
    "sdp4bit",
    DIRECT,
    "zero++",
    "qsdp",
    "loco-two-hop:exempt.min_numel=0",
)
HYBRID = ("fp32", "hybrid-shard:exempt.min_numel=0")
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def make_model():
    torch.manual_seed(3)
    return GPT(MODEL)


def tokens(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank + 1)
    return torch.randint(256, (ROWS, MODEL.context + 1), generator=generator)


def loss_of(model, batch):
    return next_byte_loss(model(batch[:, :-1]), batch[:, 1:])


def train_in_processes(texts, clip, mode, dtype):
    """The masters that each recipe leads to, losses of this rank, and what it counted.

    Where parameters are kept, what a validation gathers is what the next step computes in.
    """
    found = []
    for text in texts:
        recipe = read_recipe(text)
        policy = {"mp_policy": MixedPrecisionPolicy(dtype, torch.float32)}
        keeps = {"reshard_after_forward": False} if recipe.weights_difference else {}
        mesh = grid(2) if mode == "hsdp" else line(HOSTS_OF if mode == "hosts" else None)
        model = shard(make_model(), recipe, mesh=mesh, **policy, **keeps)
        optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2))
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, tokens(step, dist.get_rank()))
            loss.backward()
            losses.append(loss.detach())
            clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            stats = commq.handle_of(model).stats()
            masters = {name: whole(p) for name, p in model.named_parameters()}  # a validation leaves gathered ones
            if recipe.weights_difference or step == STEPS - 1:
                with torch.no_grad():
                    losses.append(loss_of(model, tokens(step, -1)))
        found.append((masters, losses, stats.sent_bytes, stats.raw_bytes))
    return found


@pytest.mark.parametrize(
    ("world_size", "mode", "texts", "dtype", "clip"),
    [
        (2, "flat", FLAT, torch.float32, 0.1),
        (2, "flat", ("full-shard", "sdp4bit"), torch.bfloat16, 0.1),
        (4, "hosts", FLAT, torch.float32, float("inf")),
        (4, "hsdp", HYBRID, torch.float32, 0.1),
    ],
)
def test_ranks_in_one_process_give_the_bits_of_processes(world_size, mode, texts, dtype, clip):
    expected = run_processes(train_in_processes, world_size, args=(texts, clip, mode, dtype))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    try:
        for number, text in enumerate(texts):
            replicas = ShardedReplicas(
                read_recipe(text),
                make_model(),
                OptimizerConfig(lr=1e-2, clip=clip),
                world_size,
                hosts=1 if mode == "flat" else 2,
                hybrid=mode == "hsdp",
                dtype=dtype,
            )
            keeps = read_recipe(text).weights_difference
            found = [[] for _ in range(world_size)]
            for step in range(STEPS):
                losses = replicas.step(torch.stack([tokens(step, rank) for rank in range(world_size)]), 1e-2)
                stats = [handle.stats() for handle in replicas.handles]
                with torch.no_grad():
                    validation = [replicas.loss(tokens(step, -1))] if keeps or step == STEPS - 1 else []
                for own, loss in zip(found, losses.tolist(), strict=True):
                    own += [loss, *map(float, validation)]
            for rank in range(world_size):
                where = f"{text}, rank {rank}"
                weights, losses, sent, raw = expected[rank][number]
                assert found[rank] == list(map(float, losses)), where
                assert (stats[rank].sent_bytes, stats[rank].raw_bytes) == (sent, raw), where
                for name, shards in replicas.masters.items():
                    assert torch.equal(torch.cat(list(shards)), weights[name]), f"{where}, {name}"
    finally:
        torch.set_num_threads(threads)


def row(mode, recipe, seed, loss):
    setting = asdict(Setting(recipe=recipe, seed=seed, parallel=mode, hosts=1 + (mode == "hsdp")))
    return {**setting, "val_loss": loss, "bits": 4, "sent_bytes": 1, "raw_bytes": 8}


@pytest.mark.parametrize(("mode", "controls"), [("fsdp", 2), ("hsdp", 1)])
def test_each_default_has_a_gate_and_controls_must_fail_it(mode, controls):
    recipes = [gate.recipe for gate in SHARDED_GATES[mode]]
    assert split_recipes(RECIPES[mode]) == recipes
    base = [row(mode, "fp32", seed, 1.0 + seed) for seed in range(3)]

    def judged(cost):
        rows = [row(mode, text, each["seed"], each["val_loss"] * cost) for text in recipes for each in base]
        return [line[:4] for line in report([*base, *rows]).splitlines() if line[:4] in ("PASS", "FAIL")]

    assert judged(1.002) == ["PASS"] * (len(recipes) - controls) + ["FAIL"] * controls
    assert judged(1.003) == ["FAIL"] * (len(recipes) - controls) + ["PASS"] * controls


def test_modes_are_not_mixed():
    rows = [row(mode, "fp32", seed, 1.0 + (mode == "hsdp")) for mode in SHARDED_GATES for seed in range(2)]
    rows += [row("fsdp", "hybrid-shard", seed, 2.0) for seed in range(2)]
    fsdp, hsdp = report(rows).split("\n\n4 ranks")
    assert "hybrid-shard" in fsdp and "+100.000" in fsdp
    assert "hybrid-shard, the default between hosts: no runs" in hsdp


@pytest.mark.parametrize(("mode", "hosts", "match"), [("hsdp", 1, "HSDP"), ("fsdp", 3, "as many on each")])
def test_hosts_that_cannot_be_are_refused(mode, hosts, match):
    with pytest.raises(ValueError, match=match):
        ShardedReplicas(read_recipe("fp32"), make_model(), OptimizerConfig(), 4, hosts=hosts, hybrid=mode == "hsdp")


def test_a_recipe_that_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="one of all-reduces"):
        ShardedReplicas(read_recipe("thc"), make_model(), OptimizerConfig(), 4)


def test_a_run_counts_its_bytes_and_validates():
    """What is counted is the whole of it: one validation gathers after the last step."""
    options = {"rows": 1, "steps": 4, "val_bytes": 64, "model": MODEL, "device": "cpu", "parallel": "fsdp"}
    plain, found = (Run(Setting(recipe=text, seed=0, **options)).execute() for text in ("fp32", "full-shard"))
    assert plain["raw_bytes"] == plain["sent_bytes"] == found["raw_bytes"]
    assert 0.15 < found["sent_bytes"] / found["raw_bytes"] < 0.35  # 8 bits twice, 4 bits, and what is exempt
    assert [step for step, *_ in found["validation"]] == [1, 2, 3, 4]
    assert found["val_loss"] == found["validation"][-1][3] < found["validation"][0][3]
