"""What sharded training costs in memory, from shapes and a rehearsal on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from commq.attach.estimated import MemoryEstimate
from commq.attach.fsdp_lanes import Lane
from commq.attach.fsdp_layout import cut_shard
from commq.attach.fsdp_plans import gradient_lanes, gradient_plan, weight_plan
from commq.attach.idle import SILENT, Idle
from commq.codecs.reference import Coding
from commq.collectives.hosts import find_hosts
from commq.collectives.plan import Plan
from commq.collectives.schedule import Schedule, run
from commq.collectives.sharded import ShardMessage, Strip, gather, scatter
from commq.feedback.rule import Feedback
from commq.recipe import Recipe

_STORAGE = {"fp32": 4, "bf16": 2, "int8": 1}


def estimate_shards(
    model: nn.Module,
    recipe: Recipe,
    world_size: int,
    *,
    units: Iterable[nn.Module],
    hosts: int,
    replicas: int,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> MemoryEstimate:
    """What `fully_shard` of `units`, then of `model`, will take by `recipe`: see `estimate_memory`."""
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    residual = second = reference = wire = 0
    gloo = next(model.parameters()).device.type == "cpu"
    hops = replicas == 1 and recipe.schedule in ("two_hop", "auto") and 1 < hosts < world_size
    for unit in (*units, model):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        if not own:
            continue
        gathered = param_dtype or own[0].dtype
        reduced = reduce_dtype or gathered
        shards = [cut_shard(names[id(p)], tuple(p.shape), 0, world_size) for p in own]
        trained = [shard for shard, p in zip(shards, own, strict=True) if p.requires_grad]
        phase = len(recipe.phases)
        lanes = gradient_lanes(recipe, trained, phase, inside=replicas > 1)
        plan = gradient_plan(recipe, lanes, reduced, world_size, hops=hops)
        if replicas == 1:
            residual += _residual(recipe.feedback, _coded(lanes, plan), world_size, recipe.format.block)
            if hops:
                second += _residual(recipe.answer_feedback, _coded(lanes, plan), hosts, recipe.format.block)
        else:
            between = gradient_lanes(recipe, trained, phase)
            residual += _residual(recipe.feedback, between, 1, recipe.format.block)
        group = (world_size, hosts if hops else 1, gloo)
        wire = max(wire, _copies(lanes, world_size, reduced.itemsize) + _lent(scatter, plan, *group))
        if recipe.weights is None or world_size == 1:
            continue
        weights, plan = weight_plan(recipe, shards, gathered, world_size)
        landing = 4 if recipe.weights_difference else gathered.itemsize
        wire = max(wire, _copies(weights, world_size, landing) + _lent(gather, plan, *group))
        if recipe.weights_difference:
            reference += (world_size + 1) * sum(shard.numel for shard in shards) * gathered.itemsize
    return MemoryEstimate(residual=residual, answer_residual=second, reference=reference, wire=wire)


def _lent(exchange: Callable[[ShardMessage], Schedule], plan: Plan, world_size: int, hosts: int, gloo: bool) -> int:
    """Bytes of the buffers of one exchange, most at any time; hosts: in two hops between so many, 1: flat."""
    transport = Idle(world_size, hosts, gloo)
    strips = []
    for part in plan.parts:
        whole = torch.empty(world_size * part.layout.chunk_numel, device="meta")
        own = whole[: part.layout.chunk_numel]
        strips.append(Strip(whole, own, Coding()) if exchange is scatter else Strip(own, whole, Coding()))
    if strips:
        run(exchange(ShardMessage(plan, strips, transport, SILENT, find_hosts(transport) if hosts > 1 else None)))
    return transport.counter.most


def _coded(lanes: Sequence[Lane], plan: Plan) -> list[Lane]:
    return [lane for lane, part in zip(lanes, plan.parts, strict=True) if part.layout.format.kind != "raw"]


def _residual(feedback: Feedback, lanes: Sequence[Lane], rows: int, block: int) -> int:
    if feedback.rule == "none":
        return 0
    numel = rows * sum(lane.numel for lane in lanes if lane.format.kind != "raw")
    return numel * _STORAGE[feedback.storage] + (4 * -(-numel // block) if feedback.storage == "int8" else 0)


def _copies(lanes: Sequence[Lane], rows: int, itemsize: int) -> int:
    return sum(rows * lane.numel * itemsize for lane in lanes if not lane.in_place)
