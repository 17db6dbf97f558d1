"""What bench/step.py compares under FSDP2: `--parallel fsdp` (full sharding) and `--parallel zero2` (parameters kept).

A block is a unit; bf16 parameters for computing, float32 masters. "no communication" is FSDP2 with collectives that
move nothing: every rank takes its own shard for everybody's, and its own part of the gradient for the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import commq
from recipe_text import read_recipe
from step_methods import Attached, Method


def fsdp_methods(keeps: bool, recipes: list[str], world_size: int) -> Iterator[Method]:
    """keeps: parameters stay after the forward pass. What costs nothing first."""
    yield Method("no communication", partial(_silent, keeps), "FSDP2 with collectives that move nothing")
    for name, dtype in (("bf16 gather, fp32 reduce", torch.float32), ("all bf16", torch.bfloat16)):
        yield Method(name, partial(_plain, keeps, dtype), "plain FSDP2")
    for text in recipes:
        recipe = read_recipe(text)
        if not (recipe.weights_difference and not keeps):
            yield Method(f"commq {text}", partial(_commq, keeps, recipe), str(recipe), measures_link=True)


def _shard(model: nn.Module, keeps: bool, reduce_dtype: torch.dtype, shard: Callable[..., Any]) -> None:
    cuda = next(model.parameters()).is_cuda
    policy = MixedPrecisionPolicy(torch.bfloat16 if cuda else None, reduce_dtype)
    for block in model.blocks:  # type: ignore[union-attr]
        shard(block, reshard_after_forward=not keeps, mp_policy=policy)
    shard(model, reshard_after_forward=False if keeps else None, mp_policy=policy)


def _plain(keeps: bool, reduce_dtype: torch.dtype, model: nn.Module) -> Attached:
    _shard(model, keeps, reduce_dtype, fully_shard)
    return Attached(model, lambda steps: None)


def _silent(keeps: bool, model: nn.Module) -> Attached:
    _shard(model, keeps, torch.float32, fully_shard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_SilentGather())  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(_SilentScatter())  # type: ignore[arg-type]
    return Attached(model, lambda steps: 0)


def _commq(keeps: bool, recipe: commq.Recipe, model: nn.Module) -> Attached:
    _shard(model, keeps, torch.float32, partial(commq.fully_shard, recipe=recipe))
    handle = commq.handle_of(model)
    return Attached(model, lambda steps: handle.stats().sent_bytes)


class _Silent:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _SilentGather(_Silent):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        output_tensor.view(group.size(), -1).copy_(input_tensor.clone())


class _SilentScatter(_Silent):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
