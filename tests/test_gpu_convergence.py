"""bench/replicas.py on a GPU: what the captured graph computes is what the same code computes without it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from commq.train.config import ModelConfig, OptimizerConfig
from commq.train.model import GPT
from recipe_text import read_recipe
from replicas import GradientUpdate, Replicas

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Watched(Replicas):
    """Keeps what each rank is about to send."""

    def __init__(self, recipe, update, world_size):
        self.sent = [None] * world_size
        super().__init__(recipe, update, world_size)

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
