"""`--tensor-parallel` and `--experts`: the plain trainer's losses, resumed bit for bit, parts that stay together."""

from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import commq
from commq.collectives.hosts import HOSTS, Hosts, find_hosts
from commq.collectives.memory import memory_of
from commq.collectives.transport import C10d
from commq.train import mixture
from commq.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, OutputConfig, PipelineConfig
from commq.train.config_numerics import GuardConfig, PrecisionConfig
from commq.train.data import load_corpus
from commq.train.metrics import read_rows
from commq.train.mixture import MixtureTrainer
from commq.train.ranks import Ranks
from commq.train.run import Run
from commq.train.tensor import TensorTrainer
from commq.train.tensor_sharded import ShardedTensorTrainer
from commq.train.trainer import Trainer
from commq.train.trainers import trainer_of
from harness import run_processes

DATA = Path(__file__).parent
CLOSE = 1e-5
"""Relative: float32 sums in another order, over three steps."""


def config(out: Path = Path("out"), *, output: dict | None = None, **options: object) -> Config:
    folder = {"log_every": 1, "val_every": 2, "checkpoint_every": 2, "tensorboard": False, **(output or {})}
    return Config(
        **{"recipe": "fp32", "steps": 4, **options},
        model=ModelConfig(layers=2, dim=64, heads=4, context=16),
        data=DataConfig(data=DATA, batch=2, accumulate=2, max_mb=0.1, val_sequences=8),
        optimizer=OptimizerConfig(warmup=2),
        output=OutputConfig(out=out, **folder),
    )


def all_ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD, 1)


def trainer(kind: type, settings: Config, ranks: Ranks) -> Trainer:
    corpus = load_corpus(DATA, max_mb=0.1, context=settings.model.context)
    return kind(settings, commq.recipe(settings.recipe, seed=0), corpus, ranks)


def same_everywhere(tensor: torch.Tensor) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.detach().contiguous())
    return all(torch.equal(each, tensor) for each in everyone)


def resumes(settings: Config, *, bytes_too: bool = True) -> None:
    """A run, and the same one killed while it wrote its last checkpoint and resumed: the same rows, bytes included.

    But for recipes of differences: a resumed run gathers its references once more.
    """
    uncounted = {"seconds": 0.0} | ({} if bytes_too else {"raw_bytes": 0, "sent_bytes": 0})

    def rows(config: Config) -> list[tuple]:
        Run(config, all_ranks()).execute()
        dist.barrier()
        return [astuple(replace(row, **uncounted)) for row in read_rows(config.output.out)]

    whole = rows(settings)
    if dist.get_rank() == 0:
        folder = settings.output.out / "checkpoints"
        (folder / "step-00000004").rename(folder / ".step-00000004")
    dist.barrier()
    assert rows(replace(settings, output=replace(settings.output, resume=True))) == whole


def tensor_parallel(out: Path) -> None:
    rank = dist.get_rank()
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    plain = trainer(Trainer, config(), Ranks(rank // 2, 2, torch.device("cpu"), columns[rank % 2], 1))
    exact = trainer(TensorTrainer, config(tensor_parallel=2, activations="fp32"), all_ranks())
    lossy = trainer(TensorTrainer, config(tensor_parallel=2, activations="spike5", recipe="int4"), all_ranks())
    for _ in range(3):
        (loss, norm), (same_loss, same_norm), (near_loss, _) = (t.train_step() for t in (plain, exact, lossy))
        assert abs(same_loss - loss) <= CLOSE * loss and abs(same_norm - norm) <= CLOSE * norm
        assert abs(near_loss - loss) <= 0.02 * loss
    assert abs(exact.validate() - plain.validate()) <= CLOSE * plain.validate()
    for each in (exact, lossy):
        assert each.count_parameters() == plain.count_parameters()
        own = {id(parameter) for parameter in each.own}
        assert len(own) == 2 * 4
        assert all(same_everywhere(p) for p in each.ddp.parameters() if id(p) not in own)
    sent, raw = lossy.handle.stats().sent_bytes, exact.handle.stats().sent_bytes
    assert exact.handle.stats().raw_bytes == raw > 5 * sent > 0
    resumes(config(out / "tensor", tensor_parallel=2, recipe="int4", activations="int8"))


def sharded_tensor_parallel(out: Path) -> None:
    """Two rows by two columns: parts of blocks, and what is whole, sharded over a column."""
    plain = trainer(TensorTrainer, config(tensor_parallel=2, activations="fp32"), all_ranks())
    settings = config(tensor_parallel=2, parallel="fsdp", activations="fp32")
    assert trainer_of(settings) is ShardedTensorTrainer
    exact = trainer(ShardedTensorTrainer, settings, all_ranks())
    lossy = {
        name: trainer(ShardedTensorTrainer, replace(settings, recipe=name, activations="int8"), all_ranks())
        for name in ("full-shard", "sdp4bit", "int4")
    }
    for _ in range(3):
        (loss, norm), (same_loss, same_norm) = plain.train_step(), exact.train_step()
        assert abs(same_loss - loss) <= CLOSE * loss and abs(same_norm - norm) <= CLOSE * norm
        for each in lossy.values():
            assert abs(each.train_step()[0] - loss) <= 0.02 * loss
    for each in (exact, *lossy.values()):
        assert each.count_parameters() == plain.count_parameters()
        own = {id(parameter) for parameter in each.own}
        assert len(own) == 2 * 4
        for parameter in each.ddp.parameters():
            assert parameter.to_local().numel() == parameter.numel() // 2
            assert same_everywhere(parameter.full_tensor()) == (id(parameter) not in own)
    for sharded, parameter in zip(exact.ddp.parameters(), plain.ddp.parameters(), strict=True):
        assert (sharded.full_tensor() - parameter).norm() <= CLOSE * parameter.norm()
    assert abs(exact.validate() - plain.validate()) <= CLOSE * plain.validate()
    stats = lossy["sdp4bit"].handle.stats()
    assert stats.raw_bytes > 3 * stats.sent_bytes > 0
    for recipe, optimizer in (("full-shard", "sgd"), ("sdp4bit", "adamw")):
        settings = config(out / recipe, tensor_parallel=2, parallel="fsdp", recipe=recipe)
        settings = replace(settings, optimizer=OptimizerConfig(optimizer=optimizer, warmup=2))
        resumes(settings, bytes_too=recipe != "sdp4bit")


def columns_that_would_drift_apart() -> None:
    corpus, settings = load_corpus(DATA, max_mb=0.1, context=16), config(tensor_parallel=2)
    for recipe in (commq.recipe("alq3"), replace(commq.recipe("int4"), schedule="auto")):
        with pytest.raises(ValueError, match=r"--tensor-parallel 2 with recipe .*decide by what each measures"):
            TensorTrainer(settings, recipe, corpus, all_ranks())
    facts = memory_of(dist.group.WORLD).facts
    before = find_hosts(C10d())
    facts[HOSTS] = Hosts((0, 0, 0, 1))  # ranks 0 and 2 are on one host, 1 and 3 on two
    with pytest.raises(ValueError, match=r"spread over hosts in different ways.*a multiple of 2 processes"):
        ShardedTensorTrainer(settings, commq.recipe("full-shard"), corpus, all_ranks())
    facts[HOSTS] = before


def experts(out: Path) -> None:
    """Against all experts on one rank, which gets the tokens of all."""
    rank = dist.get_rank()
    alone = [dist.new_group([member]) for member in range(4)][rank]
    settings = config(experts=4, activations="fp32")
    plain = trainer(MixtureTrainer, settings, Ranks(0, 1, torch.device("cpu"), alone, 1))
    parted = trainer(MixtureTrainer, settings, all_ranks())
    batches = [torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    mixture.BALANCE, balance = 0.0, mixture.BALANCE  # each rank's own: not the mean of a term of all tokens
    plain._train_batch = lambda micro: batches[micro]
    parted._train_batch = lambda micro: batches[micro].chunk(4)[rank]
    for _ in range(3):
        (loss, norm), (own_loss, same_norm) = plain.train_step(), parted.train_step()
        dist.all_reduce(own_loss)
        assert abs(own_loss / 4 - loss) <= CLOSE * loss and abs(same_norm - norm) <= CLOSE * norm
    assert same_everywhere(parted.ddp.module.blocks[0].mlp.router.weight)
    assert parted.count_parameters() == plain.count_parameters()
    mixture.BALANCE = balance
    resumes(config(out / "experts", experts=4, recipe="int4"))
    counts = parted.handle._group
    assert {"experts.dispatch", "experts.combine"} <= set(commq.functional.traffic(counts))
    with pytest.raises(ValueError, match="--experts 3 with 4 processes; choose a multiple of 4"):
        trainer(MixtureTrainer, config(experts=3), all_ranks())
    with pytest.raises(ValueError, match="--tensor-parallel 3 with 4 processes"):
        trainer(TensorTrainer, replace(config(), tensor_parallel=3, model=ModelConfig(heads=3, dim=48)), all_ranks())


def on_four_ranks(out: Path) -> None:
    tensor_parallel(out)
    columns_that_would_drift_apart()
    sharded_tensor_parallel(out / "sharded")
    experts(out)


def test_runs_on_four_ranks(tmp_path):
    run_processes(on_four_ranks, 4, args=(tmp_path,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 2, "experts": 2}, "expected one of them"),
        ({"experts": 1}, "of experts 2 or more"),
        (
            {"tensor_parallel": 2, "parallel": "hsdp", "recipe": "hybrid-shard"},
            "expected ddp or fsdp, and adamw or sgd",
        ),
        ({"experts": 4, "parallel": "fsdp", "recipe": "full-shard"}, "expected ddp, and adamw or sgd"),
        ({"tensor_parallel": 3}, "--heads 4"),
        ({"tensor_parallel": 2, "activations": "int9"}, "'int9' is unknown"),
        ({"tensor_parallel": 0}, "expected 1 or more"),
        ({"tensor_parallel": 2, "lowp": PrecisionConfig(precision="fp8")}, "options of precision or of guards"),
        ({"pipeline": PipelineConfig(pipeline_stages=2), "guard": GuardConfig(guard="watch")}, "or of guards"),
        ({"pipeline": PipelineConfig(pipeline_stages=2), "experts": 2}, "expected one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(config(**options))
