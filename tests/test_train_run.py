"""Runs on two ranks: same bits on every rank and in every run, checkpoints, and refusals.

The ranks share one machine, so the folder that a test hands them is the one they share in real life.
"""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import commq
from commq.train.checkpoint import latest_checkpoint, load_common, load_own, save_checkpoint
from commq.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, OutputConfig
from commq.train.data import load_corpus
from commq.train.metrics import read_rows
from commq.train.ranks import Ranks, compare_ranks
from commq.train.run import Run
from commq.train.trainer import Trainer
from harness import process_ranks, run_processes

TINY = ModelConfig(layers=1, dim=32, heads=2, context=16)


def config(out: Path, *, recipe: str = "int4", steps: int = 6, **output: object) -> Config:
    return Config(
        recipe=recipe,
        steps=steps,
        model=TINY,
        data=DataConfig(batch=2, accumulate=2, max_mb=0.1, val_sequences=8),
        optimizer=OptimizerConfig(warmup=2),
        output=OutputConfig(out=out, log_every=1, val_every=3, checkpoint_every=2, tensorboard=False, **output),
    )


def this_rank() -> Ranks:
    assert dist.group.WORLD is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD, 1)


def digest(state: object) -> str:
    """Of every bit of the tensors in a state, and of the rest as text. The order of a dict does not count."""
    content = hashlib.blake2b()

    def visit(part: object) -> None:
        if isinstance(part, torch.Tensor):
            content.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, value in sorted(part.items(), key=lambda item: repr(item[0])):
                content.update(repr(key).encode())
                visit(value)
        elif isinstance(part, list | tuple):
            for value in part:
                visit(value)
        else:
            content.update(repr(part).encode())

    visit(state)
    return content.hexdigest()


def gathered(value: object) -> list:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def losses(out: Path) -> list[tuple]:
    """Every row of a run but for its time."""
    return [dataclasses.astuple(dataclasses.replace(row, seconds=0.0)) for row in read_rows(out)]


@pytest.mark.parametrize("recipe", ["fp32", "int4", "onebit"])
@process_ranks(2)
def test_after_each_step_the_ranks_and_a_second_run_have_the_same_bits(tmp_path, recipe):
    settings = config(tmp_path, recipe=recipe)
    corpus = load_corpus(None, max_mb=0.1, context=TINY.context)
    first, second = (Trainer(settings, commq.recipe(recipe), corpus, this_rank()) for _ in range(2))
    seen = set()
    for _ in range(4):
        assert [x.item() for x in first.train_step()] == [x.item() for x in second.train_step()]
        states = gathered(digest(first.common_state()))
        assert states[0] == states[1] == digest(second.common_state())
        assert digest(first.own_state()) == digest(second.own_state())
        seen.add(states[0])
    assert len(seen) == 4
    assert first.validate() == second.validate()


@process_ranks(2)
def test_a_checkpoint_restores_every_bit_of_every_rank(tmp_path):
    Run(config(tmp_path / "whole"), this_rank()).execute()
    Run(config(tmp_path / "parts", keep=3), this_rank()).execute()
    folder = tmp_path / "parts" / "checkpoints"
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "step-00000006").rename(folder / ".step-00000006")  # as if killed while writing the last one
    dist.barrier()
    assert latest_checkpoint(folder).name == "step-00000004"
    resumed = Run(config(tmp_path / "parts", keep=3, resume=True), this_rank())
    assert resumed.trainer.step == 4
    resumed.execute()
    whole = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    again = latest_checkpoint(folder)
    for load in (load_common, lambda path: load_own(path, dist.get_rank())):
        one, two = load(whole), load(again)
        one.pop("seconds", None), two.pop("seconds", None)
        assert digest(one) == digest(two)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (2, 4, 6)]


@process_ranks(2)
def test_only_the_newest_checkpoints_are_kept_and_leftovers_removed(tmp_path):
    for step in (9, 10, 11):
        save_checkpoint(tmp_path, step, {"step": step}, {"rank": dist.get_rank()}, keep=2)
        dist.barrier()
        if dist.get_rank() == 0:
            (tmp_path / ".step-00000099").mkdir()  # what a crash leaves
        dist.barrier()
    save_checkpoint(tmp_path, 12, {"step": 12}, {"rank": dist.get_rank()}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000011", "step-00000012"]
    assert load_common(latest_checkpoint(tmp_path)) == {"step": 12}
    assert load_own(latest_checkpoint(tmp_path), 1) == {"rank": 1}


@process_ranks(1)
def test_a_changed_configuration_is_refused_and_named(tmp_path):
    done = config(tmp_path)
    Run(done, this_rank()).execute()
    with pytest.raises(ValueError, match="already holds a run"):
        Run(done, this_rank())

    resume = config(tmp_path, resume=True)
    for changed, name in (
        (dataclasses.replace(resume, recipe="int8"), "recipe was 'int4' and is now 'int8'"),
        (dataclasses.replace(resume, seed=1), "seed was 0 and is now 1"),
        (dataclasses.replace(resume, steps=7), "steps was 6 and is now 7"),
        (dataclasses.replace(resume, data=dataclasses.replace(resume.data, batch=3)), "batch was 2 and is now 3"),
        (dataclasses.replace(resume, optimizer=OptimizerConfig(warmup=2, lr=0.1)), "lr was 0.002 and is now 0.1"),
    ):
        with pytest.raises(ValueError, match=name):
            Run(changed, this_rank())

    text = tmp_path / "text"
    text.write_bytes(b"other bytes" * 1000)
    other = dataclasses.replace(resume.data, data=text)
    with pytest.raises(ValueError, match="digest of the data was"):
        Run(dataclasses.replace(resume, data=other), this_rank())
    free = dataclasses.replace(resume.output, log_every=5, val_every=5, checkpoint_every=5)
    assert Run(dataclasses.replace(resume, output=free), this_rank()).trainer.step == 6


@process_ranks(2)
def test_one_ranks_problem_is_every_ranks_error(tmp_path):
    rank = dist.get_rank()
    settings = config(tmp_path)
    for mine, message in (
        (dataclasses.replace(settings, recipe=("int4", "int8")[rank]), "recipe .*rank 0 has 'int4', rank 1 has 'int8'"),
        (dataclasses.replace(settings, seed=rank), "seed .*rank 0 has 0, rank 1 has 1"),
        (config(tmp_path, keep=2 + rank), "keep .*rank 0 has 2, rank 1 has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(mine, this_rank())
    if rank == 1:
        settings = dataclasses.replace(settings, data=DataConfig(data=tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"no such file or folder.*found by rank 1"):
        Run(settings, this_rank())
    compare_ranks({"all of us": "agree"})


@process_ranks(2)
def test_a_loss_that_is_not_finite_ends_every_rank_and_is_not_saved(tmp_path):
    settings = dataclasses.replace(config(tmp_path), optimizer=OptimizerConfig(optimizer="sgd", lr=1e30, warmup=0))
    run = Run(settings, this_rank())
    with pytest.raises(FloatingPointError, match="lower --lr"):
        run.execute()
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is None or all(p.isfinite().all() for p in load_common(saved)["model"].values())


def test_at_another_number_of_ranks_the_residuals_keep_their_sum(tmp_path):
    before = run_processes(residual_sum, 2, args=(config(tmp_path), True))
    reshard = config(tmp_path, resume=True, reshard=True)
    run_processes(refuses_other_ranks, 1, args=(config(tmp_path, resume=True),))
    for world_size in (1, 3):
        after = run_processes(residual_sum, world_size, args=(reshard, False))
        for name, total in before[0].items():
            assert torch.equal(after[0][name], total), (world_size, name)


def residual_sum(settings: Config, executes: bool) -> dict[str, torch.Tensor]:
    """The residuals of all ranks, added up, by parameter name."""
    run = Run(settings, this_rank())
    if executes:
        run.execute()
    values = run.trainer.handle.state_dict()["residual"]["values"]
    assert values, "int4 has residuals"
    for value in values.values():
        dist.all_reduce(value)
    return values


def refuses_other_ranks(settings: Config) -> None:
    with pytest.raises(ValueError, match=r"of 2 processes and there are now 1.*--reshard"):
        Run(settings, this_rank())
