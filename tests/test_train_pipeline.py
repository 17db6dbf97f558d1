"""Runs of `--pipeline-stages`: the losses of the whole model, resumed to the bit, refusals."""

import json

import pytest
import torch
import torch.distributed as dist

from commq.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, OutputConfig, PipelineConfig
from commq.train.model import GPT
from commq.train.pipelined import GPTStage
from commq.train.ranks import Ranks
from commq.train.run import Run
from harness import process_ranks


def config(out, *, stages=2, forward="fp32", backward="fp32", steps=4, accumulate=2, **output):
    return Config(
        recipe="fp32",
        steps=steps,
        model=ModelConfig(layers=3, dim=32, heads=2, context=16),
        data=DataConfig(batch=2, accumulate=accumulate, max_mb=0.1, val_sequences=8),
        optimizer=OptimizerConfig(warmup=2),
        pipeline=PipelineConfig(pipeline_stages=stages, pipeline_forward=forward, pipeline_backward=backward),
        output=OutputConfig(out=out, log_every=1, val_every=2, checkpoint_every=2, tensorboard=False, **output),
    )


def this_rank():
    assert dist.group.WORLD is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD, 1)


def losses(out):
    rows = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["train_loss"], row["val_loss"], row["grad_norm"]) for row in rows], rows[-1]


def train_whole(out, pipelines):
    """The whole model with DDP, on as many of the ranks as there are pipelines; the others look on."""
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    dist.destroy_process_group()
    if rank < pipelines:
        prefixed = dist.PrefixStore("whole", store)
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=pipelines)
        Run(config(out, stages=1), this_rank()).execute()
    store.set(f"whole/{rank}", "")
    store.wait([f"whole/{each}" for each in range(4)])


@process_ranks(4)
def test_two_pipelines_of_two_stages_train_as_two_whole_models(tmp_path):
    """With fp32 boundaries: the same data, the same model; only sums are in another order."""
    Run(config(tmp_path / "pipelines"), this_rank()).execute()
    train_whole(tmp_path / "whole", 2)
    found, row = losses(tmp_path / "pipelines")
    expected, plain = losses(tmp_path / "whole")
    for one, other in zip(found, expected, strict=True):
        for value, reference in zip(one, other, strict=True):
            assert value == (reference if reference is None else pytest.approx(reference, rel=2**-14))
    # Rank 0 sends the activations of the training steps and both validations, and averages its half of the model.
    activations = 4 * (2 * 2 * 16 * 32) * (4 + 2)
    assert activations < row["sent_bytes"] < activations + plain["sent_bytes"]


@process_ranks(2)
def test_a_run_goes_on_to_the_bit(tmp_path):
    options = {"forward": "int4", "backward": "int8"}
    Run(config(tmp_path / "once", **options), this_rank()).execute()
    stop_after(Run(config(tmp_path / "twice", **options), this_rank()), 2)
    Run(config(tmp_path / "twice", resume=True, **options), this_rank()).execute()
    once, twice = losses(tmp_path / "once"), losses(tmp_path / "twice")
    assert once[0] == twice[0]
    assert once[1]["sent_bytes"] == twice[1]["sent_bytes"]


def stop_after(run, steps):
    """As if a signal had come."""
    step = run.trainer.train_step

    def counted():
        if run.trainer.step == steps:
            raise KeyboardInterrupt
        return step()

    run.trainer.train_step = counted
    with pytest.raises(KeyboardInterrupt):
        run.execute()


def test_stages_hold_the_model_s_own_parameters_once():
    gpt = GPT(ModelConfig(layers=3, dim=32, heads=2, context=16))
    names = [name for index in range(3) for name, _ in GPTStage(gpt, index, 3).named_parameters()]
    assert names == [name for name, _ in gpt.named_parameters()]
    tokens = torch.arange(32).view(2, 16)
    x = tokens
    for index in range(2):
        x = GPTStage(gpt, index, 2)(x)
    assert torch.equal(x, gpt(tokens))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a stage needs a block"):
        config(tmp_path, stages=4)
    with pytest.raises(ValueError, match="expected ddp"):
        Config(parallel="fsdp", pipeline=PipelineConfig(pipeline_stages=2))


@process_ranks(3)
def test_processes_that_cannot_be_dealt_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a multiple of 2 processes"):
        Run(config(tmp_path), this_rank())
