"""bench/pipeline*.py: a chain in one process has the bits of real stages; rows of the table; gates that can fail."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import ScheduleGPipe

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import commq
import pipeline
from commq.attach.crossing import way_of
from commq.attach.pipeline import PipelineStage
from commq.train.config import ModelConfig
from commq.train.model import GPT, next_byte_loss
from commq.train.pipelined import GPTStage
from harness import process_ranks
from pipeline import Worker, line
from pipeline_chain import Chain
from pipeline_loss import BASELINE, CONTROL, METHODS, report, ways_of
from pipeline_stage import methods

ROWS, CHUNKS, STEPS = 6, 3, 3


def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(layers=3, dim=32, heads=2, context=16))


def batches():
    return torch.randint(256, (STEPS, ROWS, 17), generator=torch.Generator().manual_seed(1))


@process_ranks(3)
def test_a_chain_in_one_process_has_the_bits_of_three():
    rank, ids = dist.get_rank(), torch.arange(ROWS)
    for forward in (commq.Tiles(), commq.Differences(samples=ROWS, cache="device")):
        named = ids if isinstance(forward, commq.Differences) else None
        own, whole = GPTStage(model(), rank, 3), model()
        stage = PipelineStage(own, rank, 3, torch.device("cpu"), forward=forward, backward="int8")
        runs = ScheduleGPipe(stage, CHUNKS, loss_fn=next_byte_loss)
        chain = Chain(whole, 3, (way_of(forward), way_of("int8")))
        for tokens in batches():
            stage.set_samples(named)
            own.zero_grad()
            runs.step(*([tokens[:, :-1]] if rank == 0 else []), **({"target": tokens[:, 1:]} if rank == 2 else {}))
            whole.zero_grad()
            chain.backward(tokens, CHUNKS, named)
            expected = dict(whole.named_parameters())
            for name, parameter in own.named_parameters():
                assert torch.equal(parameter.grad, expected[name].grad), (forward, name)


@process_ranks(2)
def test_rows_say_what_was_sent():
    args = argparse.Namespace(
        rates="unshaped", model="tiny", rows=4, micro_batches=2, schedule="gpipe", device="cpu", budget=float("inf")
    )
    pipeline.SECONDS = 0.0  # as few steps as may be; this process is the test's own
    args.methods = "no communication,bf16,ahead 0,int4,differences int2"
    rows = list(Worker(args).execute())
    wanted = tuple(args.methods.split(","))
    assert [row["method"] for row in rows] == [each.name for each in methods(8) if each.name.startswith(wanted)]
    sent = {row["method"]: row["busiest_bytes"] for row in rows}
    tensor = 4 * 64 * 64  # of a step; each rank sends one and receives one
    assert sent["bf16"] == sent["ahead 0: bf16"] == 2 * tensor
    assert sent["int4 / int4"] < sent["int4 / int8"] == sent["differences int2 / int8"] < 0.52 * sent["bf16"]
    assert all(line(row, rows) for row in rows)
    args.budget = -1.0
    assert not list(Worker(args).execute())


def test_gates_pass_and_fail():
    def rows(task, method, *losses):
        return [
            {"task": task, "method": method, "seed": seed, "val_loss": loss, "sent_bytes": 1}
            for seed, loss in enumerate(losses)
        ]

    found = [*rows("pretrain", BASELINE, 1.0, 1.1, 1.2), *rows("pretrain", "tiles", 1.001, 1.1, 1.2)]
    text = report([*found, *rows("pretrain", CONTROL, 1.2, 1.3, 1.5)])
    assert "PASS  tiles +0.033 %" in text and f"PASS  {CONTROL}" in text
    text = report([*found[:3], *rows("pretrain", "tiles", 1.1, 1.2, 1.3), *rows("pretrain", CONTROL, 1.0, 1.1, 1.2)])
    assert "FAIL  tiles +9.141 %" in text and f"FAIL  {CONTROL}" in text
    for task, names in METHODS.items():
        assert all(ways_of(name, 4, 384) for name in names), task
    with pytest.raises(ValueError, match="unknown"):
        ways_of("direct int5", 4, 384)
