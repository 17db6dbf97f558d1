"""Data-parallel training of W ranks in one process: one copy of the weights, W gradients, W handles of commq.

After every step all ranks hold the same weights, so one copy is enough; what differs from rank to rank, the gradient
and commq's state, is there W times. Gradients travel by the code that DDP calls, `HookState.exchange`, each rank in a
thread of its own; tests/test_convergence.py holds the result to the bits of real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import commq
from commq.collectives.transport import Transport
from commq.lowp import Conversion
from commq.optim.exchange import FlatBucket, MomentumExchange
from commq.optim.optimizer import CommOptimizer
from commq.train.config import OptimizerConfig
from commq.train.model import next_byte_loss
from commq.train.optimizer import make_optimizer
from passes import Passes
from thread_ranks import Ranks

Handle = commq.HookState | MomentumExchange


class Update(Protocol):
    """How gradients become a step: what each rank sends by, and what is done with the average."""

    models: Sequence[nn.Module]
    """One for all ranks, or one for each rank, where their weights are not always the same."""

    def make_handle(self, recipe: commq.Recipe, rank: int, transport: Transport) -> Handle:
        """What a rank's buckets are handed to. Called on all ranks together, each in its thread."""

    def apply(self, buckets: Sequence[FlatBucket], rate: float) -> None:
        """Change the weights by what the ranks have received."""


class GradientUpdate:
    """AdamW or SGD of the trainer on the averaged gradient, clipped to a norm."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.models = [model]
        self.optimizer = make_optimizer(model, config)
        self.clip = config.clip or float("inf")

    def make_handle(self, recipe: commq.Recipe, rank: int, transport: Transport) -> Handle:
        return commq.HookState(recipe, named=self.models[0].named_parameters(), transport=transport)

    def apply(self, buckets: Sequence[FlatBucket], rate: float) -> None:
        step_with(self.optimizer, buckets[0], rate, self.clip)


class MomentumUpdate:
    """An optimizer that decides what is sent. One for all ranks, or one for each where it makes local steps."""

    def __init__(self, models: Sequence[nn.Module], make: Callable[[nn.Module], CommOptimizer], clip: float) -> None:
        self.models = models
        self.optimizers = [make(model) for model in models]
        self.clip = clip or float("inf")

    def make_handle(self, recipe: commq.Recipe, rank: int, transport: Transport) -> Handle:
        return self.optimizers[rank % len(self.models)].make_exchange(transport)

    def apply(self, buckets: Sequence[FlatBucket], rate: float) -> None:
        for optimizer, bucket in zip(self.optimizers, buckets, strict=False):
            step_with(optimizer, bucket, rate, self.clip)


def step_with(optimizer: torch.optim.Optimizer, bucket: FlatBucket, rate: float, clip: float) -> None:
    """A step with what stands in a bucket, clipped to a norm."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter, view in zip(bucket.parameters(), bucket.views, strict=True):
        parameter.grad = view
    if getattr(optimizer, "clips", True):
        clip_grad_norm_(bucket.parameters(), clip)
    optimizer.step()


class Replicas:
    """W ranks that train a model, the first of `update.models`, together."""

    def __init__(
        self, recipe: commq.Recipe, update: Update, world_size: int, conversion: Conversion | None = None
    ) -> None:
        """conversion: what made the model's linear layers low in precision; each pass gets a number of its own."""
        self.model, self.update = update.models[0], update
        self._conversion = conversion
        self.models = [update.models[rank % len(update.models)] for rank in range(world_size)]
        self.buckets = [FlatBucket(list(model.parameters())) for model in self.models]
        self.device = self.buckets[0].buffer().device
        self.ranks = Ranks(world_size)
        self.handles = self.ranks.run(lambda rank: update.make_handle(recipe, rank, self.ranks.transports[rank]))
        self.passes = Passes(self._find_gradients, self.device)

    def step(self, tokens_WBT: Tensor, rate: float) -> Tensor:
        """One optimizer step. tokens: int64, T = context + 1, one batch for each rank. Returns the loss of each."""
        losses_W = self.passes(tokens_WBT)
        self.ranks.run(self._exchange)
        self.update.apply(self.buckets, rate)
        return losses_W

    def forget_graph(self) -> None:
        """The model computes something else from now on."""
        self.passes.forget()

    @property
    def sent_bytes(self) -> int:
        """By rank 0."""
        return self.ranks.transports[0].memory.sent_bytes

    @property
    def raw_bytes(self) -> int:
        """What fp32 would have taken."""
        return self.handles[0].stats().raw_bytes

    def observe(self, loss: float) -> None:
        """Tell recipes with phases that end by the loss what it is."""
        if isinstance(self.handles[0], commq.HookState):
            self.ranks.run(lambda rank: self.handles[rank].observe(loss))

    def loss(self, tokens_BT: Tensor, rank: int = 0) -> Tensor:
        """Mean loss of sequences under a rank's weights, as the trainer computes it."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            logits = self.models[rank](tokens_BT[:, :-1])
        return next_byte_loss(logits, tokens_BT[:, 1:])

    def _exchange(self, rank: int) -> None:
        self.handles[rank].exchange(self.buckets[rank])

    def _find_gradients(self, rank: int, tokens_BT: Tensor) -> Tensor:
        if self._conversion is not None:  # on the device, so that a captured graph counts on
            next(iter(self._conversion.modules.values())).clock.step.add_(1)
        bucket = self.buckets[rank]
        loss = self.loss(tokens_BT, rank)
        torch._foreach_copy_(bucket.views, torch.autograd.grad(loss, bucket.parameters()))
        return loss.detach()
