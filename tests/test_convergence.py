"""bench/convergence.py: ranks in one process give the bits of real processes, and its gates can fail."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import commq
from commq.train.config import ModelConfig, OptimizerConfig
from commq.train.model import GPT, next_byte_loss
from commq.train.optimizer import make_comm_optimizer, make_optimizer
from convergence_report import find_gaps, report
from convergence_run import MOMENTA, UPDATES, Setting
from harness import run_processes
from recipe_text import read_recipe
from replicas import GradientUpdate, Replicas

STEPS, ROWS = 3, 2
MODEL = ModelConfig(layers=1, dim=48, heads=2, context=16)
OPTIMIZER = OptimizerConfig(lr=1e-2)
RECIPES = (
    "fp32",
    "int8",
    "int4",
    "onebit",
    "onebit:warm_up=1",
    "int4:rounding=stochastic,rotation=32",
    "doublesqueeze",
    "loco",
    "marsit",
    "thc",
    "int4:schedule=one_shot,feedback=none",
)


MOMENTUM_RECIPES = {
    "birder": "onebit:answer=sign/128:bf16,format=sign/128:bf16,rotation=null,rounding=stochastic",
    "signsgd-mv": "doublesqueeze:feedback=none,answer_feedback=none",
}
"""What the optimizers send by, where it is not doublesqueeze."""


def make_model():
    torch.manual_seed(3)
    return GPT(MODEL)


def tokens(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(256, (ROWS, MODEL.context + 1), generator=generator)


def train_in_processes(texts):
    """The weights that each recipe leads to."""
    found = []
    for text in texts:
        ddp = DistributedDataParallel(make_model(), bucket_cap_mb=0.05)
        commq.register(ddp, read_recipe(text))
        optimizer = make_optimizer(ddp, OPTIMIZER)
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = tokens(step, dist.get_rank())
            next_byte_loss(ddp(batch[:, :-1]), batch[:, 1:]).backward()
            clip_grad_norm_(ddp.parameters(), OPTIMIZER.clip)
            optimizer.step()
        found.append(parameters_to_vector(ddp.parameters()).detach())
    return found


def train_in_threads(text, world_size):
    model = make_model()
    update = GradientUpdate(model, OPTIMIZER)
    replicas = Replicas(read_recipe(text), update, world_size)
    for step in range(STEPS):
        replicas.step(torch.stack([tokens(step, rank) for rank in range(world_size)]), OPTIMIZER.lr)
    return parameters_to_vector(model.parameters()).detach()


def settings_of(kind):
    return replace(OPTIMIZER, optimizer=kind, freeze_step=2)


def train_with_momenta(kinds, steps):
    """The weights that each optimizer leads to on this rank."""
    found = []
    for kind in kinds:
        ddp = DistributedDataParallel(make_model(), bucket_cap_mb=0.05)
        optimizer = make_comm_optimizer(ddp, settings_of(kind), 14)
        for step in range(steps):
            optimizer.zero_grad()
            batch = tokens(step, dist.get_rank())
            next_byte_loss(ddp(batch[:, :-1]), batch[:, 1:]).backward()
            if optimizer.clips:
                clip_grad_norm_(ddp.parameters(), OPTIMIZER.clip)
            for group in optimizer.param_groups:
                group["lr"] = OPTIMIZER.lr
            optimizer.step()
        found.append(parameters_to_vector(ddp.parameters()).detach())
    return found


def test_optimizers_in_one_process_give_the_bits_of_processes():
    """The last step of zero-one-adam is a local one: ranks differ, there and here."""
    steps, world_size = 6, 3
    expected = run_processes(train_with_momenta, world_size, args=(MOMENTA, steps))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, kind in enumerate(MOMENTA):
            recipe = MOMENTUM_RECIPES.get(kind, "doublesqueeze")
            setting = Setting(recipe=recipe, seed=0, steps=14, world_size=world_size, optimizer=settings_of(kind))
            update = UPDATES[kind](setting, make_model())
            replicas = Replicas(read_recipe("fp32"), update, world_size)
            for step in range(steps):
                replicas.step(torch.stack([tokens(step, rank) for rank in range(world_size)]), OPTIMIZER.lr)
            for rank, model in enumerate(replicas.models):
                weights = parameters_to_vector(model.parameters()).detach()
                assert torch.equal(weights, expected[rank][number]), f"{kind}, rank {rank}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_in_one_process_give_the_bits_of_processes(world_size):
    """With three ranks not those that leave exempt parameters to the library, which adds in an order of its own."""
    texts = [text for text in RECIPES if world_size == 2 or text not in ("thc", "marsit")]
    expected = run_processes(train_in_processes, world_size, args=(texts,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    try:
        for number, text in enumerate(texts):
            weights = train_in_threads(text, world_size)
            for rank in range(world_size):
                assert torch.equal(weights, expected[rank][number]), f"{text}, rank {rank}"
    finally:
        torch.set_num_threads(threads)


def row(recipe, seed, loss, bits=4):
    setting = asdict(Setting(recipe=recipe, seed=seed))
    return {**setting, "val_loss": loss, "bits": bits, "sent_bytes": 1, "raw_bytes": 8}


def verdicts(rows):
    lines = [line for line in report(rows).splitlines() if line[:4] in ("PASS", "FAIL")]
    return {line[6:].split(":")[0]: line[:4] for line in lines}


def test_gaps_are_between_runs_of_one_seed():
    """Seeds differ by far more than the recipe costs; only pairs show that."""
    base = [row("fp32", seed, loss, 32) for seed, loss in enumerate((1.0, 1.5, 0.5))]
    (gap,) = [
        g
        for g in find_gaps([*base, *(row("int4", s, b["val_loss"] * 1.01) for s, b in enumerate(base))])
        if g.bits == 4
    ]
    assert gap.mean == pytest.approx(1.0) and gap.error < 1e-9
    assert gap.ratio == 1 / 8


def test_a_run_without_its_partner_is_not_counted():
    rows = [row("fp32", 0, 1.0, 32), row("int4", 0, 1.1), row("int4", 1, 9.0)]
    (gap,) = [g for g in find_gaps(rows) if g.bits == 4]
    assert gap.gaps == [pytest.approx(10.0)]


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [((1.002, 1.002, 1.002), "PASS"), ((1.01, 1.01, 1.01), "FAIL"), ((1.02, 0.99, 1.01), "PASS"), ((1.001,), None)],
    ids=["below the bound", "above it", "above it, within two standard errors", "one seed has no error"],
)
def test_gate_of_int4(losses, verdict):
    base = [row("fp32", seed, 1.0, 32) for seed in range(3)]
    found = verdicts([*base, *(row("int4", s, loss) for s, loss in enumerate(losses))])
    assert found.get("int4, the default") == verdict


def test_settings_are_not_mixed():
    rows = [row("fp32", seed, 1.0, 32) for seed in range(2)] + [row("int4", seed, 1.0) for seed in range(2)]
    others = [{**each, "steps": 10, "val_loss": 2.0 * each["val_loss"] + (each["bits"] == 4)} for each in rows]
    assert [line[:4] for line in report([*rows, *others]).splitlines() if "int4, the" in line] == ["PASS", "FAIL"]


def test_a_diverged_run_fails_and_the_control_must():
    base = [row("fp32", seed, 1.0, 32) for seed in range(2)]
    found = verdicts([*base, *(row("int2", seed, None, 2) for seed in range(2))])
    assert found["best of 2 bits"] == "FAIL"
    assert found["control"] == "PASS"
    found = verdicts([*base, *(row("int2", seed, 1.001, 2) for seed in range(2))])
    assert found["control"] == "FAIL"


def test_a_recipe_is_read_from_one_word():
    expected = commq.recipe("int4", rotation=32, feedback="none", exempt=commq.Exempt(min_numel=0), block=64)
    assert read_recipe("int4:rotation=32,feedback=none,exempt.min_numel=0,block=64") == expected
    with pytest.raises(ValueError, match="expected name=value"):
        read_recipe("int4:rotation")
