"""estimate_memory: what compression will cost, before any process runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commq.attach.ddp_estimate import estimate_buckets
from commq.attach.estimated import MemoryEstimate
from commq.attach.fsdp_estimate import estimate_shards
from commq.recipe import Recipe
from commq.recipes import recipe as get_recipe


def estimate_memory(
    model: nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any],
    world_size: int,
    *,
    bucket_cap_mb: float | None = None,
    hosts: int = 1,
    units: Iterable[nn.Module] | None = None,
    replicas: int = 1,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> MemoryEstimate:
    """What a recipe will take on one rank of `world_size`. Nothing is sent.

    model: not sharded, on any device, "meta" too; a model on the CPU is taken to use gloo, which needs a copy for
    all-gathers. hosts: for two hops, with as many ranks on each.

    Without `units` of `register(DistributedDataParallel(model), recipe)`; bucket_cap_mb: DDP's. Schedule "auto" counts
    as two_shot. Buckets are cut as DDP cuts them after its first step, where that follows the order of parameters.

    With `units` of `fully_shard` of each of them, children first, and then of `model`. world_size: ranks that
    parameters are sharded over, along dimension 0; replicas: of those, in HSDP; what an all-reduce of shards borrows
    between hosts is not counted. param_dtype, reduce_dtype: of mp_policy.
    """
    resolved = recipe if isinstance(recipe, Recipe) else get_recipe(recipe)
    if world_size < 1 or world_size % hosts:
        raise ValueError(f"world_size={world_size}, hosts={hosts}: expected a multiple of the hosts, at least 1")
    if units is None:
        if (replicas, param_dtype, reduce_dtype) != (1, None, None):
            raise ValueError("replicas, param_dtype, reduce_dtype: of sharded training; pass units, () for one unit")
        return estimate_buckets(model, resolved, world_size, bucket_cap_mb=bucket_cap_mb, hosts=hosts)
    if bucket_cap_mb is not None:
        raise ValueError(f"bucket_cap_mb={bucket_cap_mb} with units: sharded training has no buckets; drop one of them")
    return estimate_shards(
        model,
        resolved,
        world_size,
        units=units,
        hosts=hosts,
        replicas=replicas,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
    )
