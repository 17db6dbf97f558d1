"""`--parallel fsdp` and `hsdp`: resumed bit for bit, re-sharded on other ranks, close to ddp."""

from dataclasses import astuple, replace
from pathlib import Path

import torch
import torch.distributed as dist

from commq.collectives.hosts import HOSTS, Hosts
from commq.collectives.memory import memory_of
from commq.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, OutputConfig
from commq.train.metrics import read_rows
from commq.train.ranks import Ranks
from commq.train.run import Run
from harness import run_processes


def config(out: Path, parallel: str, recipe: str = "default", **output: object) -> Config:
    return Config(
        recipe=recipe,
        parallel=parallel,
        steps=6,
        model=ModelConfig(layers=2, dim=64, heads=2, context=16),
        data=DataConfig(batch=2, accumulate=2, max_mb=0.1, val_sequences=8),
        optimizer=OptimizerConfig(warmup=2),
        output=OutputConfig(out=out, log_every=1, val_every=3, checkpoint_every=2, keep=3, tensorboard=False, **output),
    )


def train(out: Path, parallel: str, recipe: str = "default", **output: object) -> list[tuple]:
    """Rows of a run, but for times and bytes: a resumed one gathers its references once more."""
    rank = dist.get_rank()
    memory_of(dist.group.WORLD).facts[HOSTS] = Hosts(tuple(r // 2 for r in range(dist.get_world_size())))
    ranks = Ranks(rank, dist.get_world_size(), torch.device("cpu"), dist.group.WORLD, 1)
    Run(config(out, parallel, recipe, **output), ranks).execute()
    dist.barrier()
    return [astuple(replace(row, seconds=0.0, sent_bytes=0, raw_bytes=0)) for row in read_rows(out)]


def resumes(out: Path, *arguments: str) -> list[tuple]:
    rows = train(out / arguments[-1], *arguments)
    if dist.get_rank() == 0:
        folder = out / arguments[-1] / "checkpoints"
        (folder / "step-00000006").rename(folder / ".step-00000006")  # as if killed while writing the last one
    dist.barrier()
    assert train(out / arguments[-1], *arguments, resume=True) == rows
    return rows


def on_two_ranks(out: Path) -> None:
    plain = train(out / "ddp", "ddp", "fp32")
    exact = train(out / "fp32", "fsdp", "fp32")
    for a, b in zip(plain, exact, strict=True):
        assert abs(a[1] - b[1]) < 1e-5 * a[1]  # the loss; the order in which clipping adds up the norm is another one
    for recipe in ("full-shard", "sdp4bit", "loco"):
        rows = resumes(out, "fsdp", recipe)
        assert abs(rows[-1][1] - plain[-1][1]) < 0.02 * plain[-1][1]


def on_four_ranks(out: Path) -> None:
    resumes(out, "hsdp", "hybrid-shard")
    for parallel, recipe in (("fsdp", "loco"), ("fsdp", "sdp4bit")):  # of two ranks, now on four
        if dist.get_rank() == 0:
            folder = out / recipe / "checkpoints"
            (folder / "step-00000006").rename(folder / ".step-00000006")
        dist.barrier()
        rows = train(out / recipe, parallel, recipe, resume=True, reshard=True)
        assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_runs(tmp_path):
    run_processes(on_two_ranks, 2, args=(tmp_path,), timeout=120)
    run_processes(on_four_ranks, 4, args=(tmp_path,), timeout=120)
