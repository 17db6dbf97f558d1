"""Estimates: what encoding sharded training costs in memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commq.attach.fsdp_lanes import Lane
from commq.attach.fsdp_layout import cut_shard
from commq.attach.fsdp_plans import gradient_lanes, gradient_plan, weight_plan
from commq.collectives.plan import Plan
from commq.feedback.rule import Feedback
from commq.recipe import Recipe
from commq.recipes import recipe as get_recipe

_STORAGE = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class ShardMemoryEstimate:
    """Bytes on one rank, besides what FSDP2 itself takes."""

    residual: int
    """Of the ranks' own gradients: every element that is encoded with feedback, on every rank; between hosts, of
    shards."""
    second_residual: int
    """Of a second hop, float32: the shards of all hosts' ranks of one number."""
    reference: int
    """What differences of weights are to: all parameters, as they are gathered, and the own shards once more."""
    wire: int
    """Buffers that are sent, received, or hold aligned copies: most at any time of a step. They are lent, not kept."""

    @property
    def total(self) -> int:
        return self.residual + self.second_residual + self.reference + self.wire


def estimate_shard_memory(
    model: nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any],
    world_size: int,
    *,
    units: Iterable[nn.Module] = (),
    hosts: int = 1,
    replicas: int = 1,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> ShardMemoryEstimate:
    """What `fully_shard` of `units`, then of `model`, will take by `recipe` on one rank. Nothing is sent.

    model: not sharded yet, on any device, "meta" too. world_size: ranks that parameters are sharded over; replicas: of
    those, in HSDP. units: modules sharded on their own, children first. hosts: of as many ranks each, for two hops.
    param_dtype, reduce_dtype: of mp_policy. Parameters are cut along dimension 0.
    """
    resolved = recipe if isinstance(recipe, Recipe) else get_recipe(recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    residual = second = reference = wire = 0
    hops = replicas == 1 and resolved.schedule in ("two_hop", "auto") and 1 < hosts < world_size
    for unit in (*units, model):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        if not own:
            continue
        gathered = param_dtype or own[0].dtype
        reduced = reduce_dtype or gathered
        shards = [cut_shard(names[id(p)], tuple(p.shape), 0, world_size) for p in own]
        trained = [shard for shard, p in zip(shards, own, strict=True) if p.requires_grad]
        phase = len(resolved.phases)
        lanes = gradient_lanes(resolved, trained, phase, inside=replicas > 1)
        plan = gradient_plan(resolved, lanes, reduced, world_size, hops=hops)
        if replicas == 1:
            residual += _residual(resolved.feedback, _coded(lanes, plan), world_size, resolved.format.block)
            if hops:
                second += _residual(resolved.answer_feedback, _coded(lanes, plan), hosts, resolved.format.block)
        else:
            between = gradient_lanes(resolved, trained, phase)
            residual += _residual(resolved.feedback, between, 1, resolved.format.block)
        count = hosts if hops else 0
        wire = max(wire, _copies(lanes, world_size, reduced.itemsize) + scatter_buffers(plan, count))
        if resolved.weights is None or world_size == 1:
            continue
        weights, plan = weight_plan(resolved, shards, gathered, world_size)
        landing = 4 if resolved.weights_difference else gathered.itemsize
        wire = max(wire, _copies(weights, world_size, landing) + gather_buffers(plan, count))
        if resolved.weights_difference:
            reference += (world_size + 1) * sum(shard.numel for shard in shards) * gathered.itemsize
    return ShardMemoryEstimate(residual=residual, second_residual=second, reference=reference, wire=wire)


def scatter_buffers(plan: Plan, hosts: int) -> int:
    """Bytes of the buffers of one reduce-scatter, most at any time; hosts: in two hops between so many, 0: flat."""
    if not hosts:
        return 2 * plan.world_size * plan.row_bytes
    return max(
        2 * plan.world_size * plan.inside_bytes,
        plan.world_size * plan.inside_bytes + hosts * plan.row_bytes,
        2 * hosts * plan.row_bytes,
    )


def gather_buffers(plan: Plan, hosts: int) -> int:
    """Bytes of the buffers of one all-gather, most at any time. gloo takes world_size rows more."""
    rows = 1 + plan.world_size
    if hosts:
        rows = 1 + max(2 * hosts, hosts + 2 * plan.world_size)
    return rows * plan.row_bytes


def _coded(lanes: Sequence[Lane], plan: Plan) -> list[Lane]:
    return [lane for lane, part in zip(lanes, plan.parts, strict=True) if part.layout.format.kind != "raw"]


def _residual(feedback: Feedback, lanes: Sequence[Lane], rows: int, block: int) -> int:
    if feedback.rule == "none":
        return 0
    numel = rows * sum(lane.numel for lane in lanes if lane.format.kind != "raw")
    return numel * _STORAGE[feedback.storage] + (4 * -(-numel // block) if feedback.storage == "int8" else 0)


def _copies(lanes: Sequence[Lane], rows: int, itemsize: int) -> int:
    return sum(rows * lane.numel * itemsize for lane in lanes if not lane.in_place)
