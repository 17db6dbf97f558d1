"""bench/replicas.py on a GPU: what the captured graph computes is what the same code computes without it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from commq.lowp import convert, policy
from commq.train.config import ModelConfig, OptimizerConfig
from commq.train.model import GPT
from recipe_text import read_recipe
from replicas import GradientUpdate, Replicas
from sharded_replicas import ShardedReplicas

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Watched(Replicas):
    """Keeps what each rank is about to send."""

    def __init__(self, recipe, update, world_size, conversion=None):
        self.sent = [None] * world_size
        super().__init__(recipe, update, world_size, conversion)

    def _exchange(self, rank):
        self.sent[rank] = self.buckets[rank].buffer().clone()
        super()._exchange(rank)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4", "onebit"])
def test_captured_gradients_are_those_of_the_model(recipe):
    torch.manual_seed(0)
    model = GPT(ModelConfig(layers=2, dim=64, heads=2, context=32)).cuda()
    replicas = Watched(read_recipe(recipe), GradientUpdate(model, OptimizerConfig(lr=1e-3)), 4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(256, (4, 2, 33), generator=generator)
        expected = []
        for batch in tokens.cuda():
            loss = replicas.loss(batch)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            expected.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
        del loss  # its graph remembers the stream it was made on, which a capture must not wait for
        losses = replicas.step(tokens, 1e-3)
        for rank, (alone, gradient) in enumerate(expected):
            # bfloat16 products in another order: each has an error of 2**-9, and they add up as squares.
            assert abs(losses[rank] - alone) <= 2.0**-9 * alone
            assert (replicas.sent[rank] - gradient).norm() <= 2.0**-6 * gradient.norm()
        others = [bucket.buffer() for bucket in replicas.buckets[1:]]  # the first was clipped in place
        assert all(torch.equal(others[0], other) for other in others)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_captured_low_precision_is_that_of_the_model_and_follows_its_schedule(precision):
    """Nearest rounding, so a pass does not depend on its number, which the graph counts on the device."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(layers=2, dim=64, heads=2, context=32)).cuda()
    conversion = convert(model, replace(policy(precision), min_features=0))
    update = GradientUpdate(model, OptimizerConfig(optimizer="adamw8bit", lr=1e-3))
    replicas = Watched(read_recipe("fp32"), update, 2, conversion)
    generator = torch.Generator().manual_seed(1)
    clock, seen = conversion.modules["blocks.0.mlp.0"].clock, []
    for step in range(4):
        if step == 2:
            conversion.set_policy("bf16")
            replicas.forget_graph()
        tokens = torch.randint(256, (2, 2, 33), generator=generator)
        expected = []
        for batch in tokens.cuda():
            gradients = torch.autograd.grad(replicas.loss(batch), list(model.parameters()))
            expected.append(torch.cat([g.flatten() for g in gradients]))
        replicas.step(tokens, 1e-3)
        seen.append(int(clock.step))
        for rank, gradient in enumerate(expected):
            # Sums of products in bfloat16 and float32 in another order, which may round a number to the next code.
            assert (replicas.sent[rank] - gradient).norm() <= 2.0**-5 * gradient.norm()
    assert seen == sorted(set(seen))


class WatchedShards(ShardedReplicas):
    """Keeps what each rank is about to send."""

    def _scatter(self, rank):
        pieces = [piece for unit in self.units for parts in unit.sources[rank] for piece in parts]
        self.sent[rank] = torch.cat([piece.flatten() for piece in pieces])
        super()._scatter(rank)


@pytest.mark.parametrize(
    ("recipe", "hosts"),
    [("fp32", 1), ("full-shard", 1), ("sdp4bit", 2), ("zero++", 2), ("loco-two-hop", 2), ("hybrid-shard", 2)],
)
def test_captured_gradients_of_shards_are_those_of_the_model(recipe, hosts):
    torch.manual_seed(0)
    model = GPT(ModelConfig(layers=2, dim=64, heads=2, context=32)).cuda()
    sharding = {"hosts": hosts, "hybrid": recipe == "hybrid-shard", "dtype": torch.bfloat16}
    replicas = WatchedShards(read_recipe(recipe), model, OptimizerConfig(), 4, **sharding)
    replicas.sent = [None] * 4
    generator = torch.Generator().manual_seed(1)
    parameters = [parameter for unit in replicas.units for parameter in unit.parameters]
    for _ in range(3):
        tokens = torch.randint(256, (4, 2, 33), generator=generator)
        expected = []
        for batch in tokens.cuda():
            loss = replicas.loss(batch)
            gradients = torch.autograd.grad(loss, parameters)
            expected.append((loss.detach(), torch.cat([g.flatten() for g in gradients]).float()))
        del loss
        losses = replicas.step(tokens, 1e-3)
        for rank, (alone, gradient) in enumerate(expected):
            # bfloat16 products in another order: each has an error of 2**-9, and they add up as squares.
            assert abs(losses[rank] - alone) <= 2.0**-9 * alone
            assert (replicas.sent[rank] - gradient).norm() <= 2.0**-6 * gradient.norm()
        shards = [shard.grad.flatten() for unit in replicas.units for each in unit.masters.values() for shard in each]
        mean, reduced = torch.stack(replicas.sent).mean(dim=0), torch.cat(shards)
        reduced *= (mean @ reduced) / reduced.square().sum()  # it was clipped
        # Sums of four numbers and their scale; in 4 bits, an element is off by up to a seventh of its block's largest.
        assert (reduced - mean).norm() <= (2.0**-19 if recipe == "fp32" else 0.25) * mean.norm()
