"""bench/convergence.py on sharded training: ranks in one process give the bits of commq.fully_shard in processes."""

import sys
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
from fsdp_cases import grid, line, shard, whole
from harness import run_processes
from recipe_text import read_recipe
from sharded_replicas import ShardedReplicas

STEPS, ROWS, HOSTS_OF = 3, 2, [0, 0, 1, 1]
MODEL = ModelConfig(layers=2, dim=50, heads=5, context=16)
"""Rows of no parameter but the embedding and the head can be shared out evenly by four ranks."""
FLAT = (
    "fp32",
    "full-shard",
    "sdp4bit",
    "sdp4bit:weights_difference=false",
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
