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
from commq.train.config import OptimizerConfig
from commq.train.model import next_byte_loss
from commq.train.optimizer import make_optimizer
from thread_ranks import Ranks


class Flat:
    """A rank's gradients as one vector, with the methods of DDP's GradBucket."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._buffer = torch.zeros(sum(p.numel() for p in parameters), device=self._parameters[0].device)
        parts = self._buffer.split([p.numel() for p in parameters])
        self.views = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]

    def buffer(self) -> Tensor:
        return self._buffer

    def index(self) -> int:
        return 0

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def is_last(self) -> bool:
        return True


class Update(Protocol):
    """How gradients become a step: what each rank sends, and what is done with the average."""

    def prepare(self, rank: int, bucket: Flat) -> None:
        """Turn a rank's gradient into what it sends, in place. Called in the rank's thread, before the exchange."""

    def apply(self, bucket: Flat, rate: float) -> None:
        """Change the weights by what all ranks have received, in `bucket`."""


class GradientUpdate:
    """AdamW or SGD of the trainer on the averaged gradient, clipped to a norm."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.parameters = list(model.parameters())
        self.optimizer = make_optimizer(model, config)
        self.clip = config.clip or float("inf")

    def prepare(self, rank: int, bucket: Flat) -> None:
        """The gradient itself is sent."""

    def apply(self, bucket: Flat, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter, view in zip(self.parameters, bucket.views, strict=True):
            parameter.grad = view
        clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()


class _Named:
    """A model, as DDP shows it to a handle: for the names of its parameters."""

    process_group = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Replicas:
    """W ranks that train `model` together."""

    def __init__(self, model: nn.Module, recipe: commq.Recipe, update: Update, world_size: int) -> None:
        self.model, self.update = model, update
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.buckets = [Flat(self.parameters) for _ in range(world_size)]
        self.ranks = Ranks(world_size)
        named = _Named(model)
        self.handles = self.ranks.run(
            lambda rank: commq.HookState(recipe, named, transport=self.ranks.transports[rank])
        )
        self._backward: Callable[[], None] | None = None

    def step(self, tokens_WBT: Tensor, rate: float) -> Tensor:
        """One optimizer step. tokens: int64, T = context + 1, one batch for each rank. Returns the loss of each."""
        if self._backward is None:
            self._tokens_WBT = torch.empty_like(tokens_WBT, device=self.device)
            self._losses_W = torch.zeros(len(tokens_WBT), device=self.device)
            self._tokens_WBT.copy_(tokens_WBT)
            self._backward = self._captured() if self.device.type == "cuda" else self._find_gradients
        self._tokens_WBT.copy_(tokens_WBT, non_blocking=True)
        self._backward()
        self.ranks.run(self._exchange)
        self.update.apply(self.buckets[0], rate)
        return self._losses_W

    def observe(self, loss: float) -> None:
        """Tell recipes with phases that end by the loss what it is."""
        self.ranks.run(lambda rank: self.handles[rank].observe(loss))

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean loss of sequences, as the trainer computes it."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            logits = self.model(tokens_BT[:, :-1])
        return next_byte_loss(logits, tokens_BT[:, 1:])

    def _exchange(self, rank: int) -> None:
        bucket = self.buckets[rank]
        self.update.prepare(rank, bucket)
        self.handles[rank].exchange(bucket)

    def _find_gradients(self) -> None:
        for rank, bucket in enumerate(self.buckets):
            loss = self.loss(self._tokens_WBT[rank])
            gradients = torch.autograd.grad(loss, self.parameters)
            torch._foreach_copy_(bucket.views, gradients)
            self._losses_W[rank] = loss.detach()

    def _captured(self) -> Callable[[], None]:
        """Forward and backward of all ranks as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._find_gradients()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._find_gradients()
        return graph.replay
