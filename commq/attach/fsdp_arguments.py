"""The arguments of FullyShardedDataParallel, said in the words of fully_shard.

Arguments that have no counterpart any more warn once, those that cannot be translated are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)

from commq.collectives.hosts import find_hosts
from commq.collectives.transport import C10d

DIMS = ("replicate", "shard")
Policy = Callable[..., bool] | Iterable[type[nn.Module]]

_warned: set[str] = set()


def warn_once(name: str, why: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"commq.FSDP: {name} {why}", stacklevel=4)


def strategy_of(value: ShardingStrategy | str | None) -> ShardingStrategy:
    """From torch's ShardingStrategy or its name; None is FULL_SHARD."""
    if value is None:
        return ShardingStrategy.FULL_SHARD
    if isinstance(value, str) and value in ShardingStrategy.__members__:
        return ShardingStrategy[value]
    if not isinstance(value, ShardingStrategy):
        raise ValueError(f"sharding_strategy={value!r}: expected one of {', '.join(ShardingStrategy.__members__)}")
    return value


def is_hybrid(strategy: ShardingStrategy) -> bool:
    return strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


def mesh_of(
    strategy: ShardingStrategy,
    device_mesh: DeviceMesh | None,
    process_group: dist.ProcessGroup | tuple[dist.ProcessGroup, dist.ProcessGroup] | None,
    device_type: str,
) -> DeviceMesh:
    """The mesh to shard on: of two dimensions (replicate, shard) for HYBRID_SHARD and NO_SHARD, else of one."""
    if device_mesh is not None and process_group is not None:
        raise ValueError("device_mesh and process_group: expected one of them")
    two = is_hybrid(strategy)
    if isinstance(process_group, tuple):
        if not two:
            raise ValueError(f"process_group of two groups with {strategy.name}: expected one, or HYBRID_SHARD")
        shard, replicate = process_group
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, dist.get_process_group_ranks(shard))
        ranks = torch.tensor(list(dict.fromkeys(tuple(row) for row in rows)))
        return DeviceMesh.from_group([replicate, shard], device_type, ranks, mesh_dim_names=DIMS)
    if device_mesh is not None and strategy != ShardingStrategy.NO_SHARD:
        if device_mesh.ndim != 1 + two:
            raise ValueError(f"device_mesh of {device_mesh.ndim} dimensions with {strategy.name}: expected {1 + two}")
        return device_mesh
    if device_mesh is not None:
        process_group = device_mesh.get_group()
    if not two and strategy != ShardingStrategy.NO_SHARD and process_group is not None:
        return DeviceMesh.from_group(process_group, device_type)
    world_size = dist.get_world_size()
    if process_group is not None and dist.get_world_size(process_group) != world_size:
        raise ValueError(
            f"process_group with {strategy.name}: of {dist.get_world_size(process_group)} of {world_size} ranks; pass "
            "a device_mesh of two named dimensions (replicate, shard)"
        )
    if strategy == ShardingStrategy.NO_SHARD:
        return init_device_mesh(device_type, (world_size, 1), mesh_dim_names=DIMS)
    if not two:
        return init_device_mesh(device_type, (world_size,))
    hosts = find_hosts(C10d())
    each = hosts.ranks_per_host
    if each is None or [rank for members in hosts.members for rank in members] != list(range(world_size)):
        raise ValueError(f"HYBRID_SHARD: hosts of ranks {hosts.members}; pass a device_mesh (replicate, shard)")
    return init_device_mesh(device_type, (hosts.count, each), mesh_dim_names=DIMS)


def precision_of(
    value: MixedPrecision | MixedPrecisionPolicy | None, *, root: bool
) -> tuple[MixedPrecisionPolicy, torch.dtype | None]:
    """The policy, and the dtype of floating-point buffers (None: as they are)."""
    if value is None or isinstance(value, MixedPrecisionPolicy):
        return value or MixedPrecisionPolicy(), None
    if not isinstance(value, MixedPrecision):
        raise TypeError(f"mixed_precision is a {type(value).__name__}, expected MixedPrecision or MixedPrecisionPolicy")
    if value.keep_low_precision_grads:
        warn_once("mixed_precision.keep_low_precision_grads", "has no effect: gradients have the parameters' dtype")
    casts = value.cast_forward_inputs or (root and value.cast_root_forward_inputs)
    policy = MixedPrecisionPolicy(
        param_dtype=value.param_dtype, reduce_dtype=value.reduce_dtype, cast_forward_inputs=casts
    )
    return policy, value.buffer_dtype


def offload_of(value: CPUOffload | OffloadPolicy | bool | None) -> OffloadPolicy:
    if isinstance(value, OffloadPolicy):
        return value
    wanted = value.offload_params if isinstance(value, CPUOffload) else bool(value)
    return CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if wanted else OffloadPolicy()


def ignored_of(
    modules: Iterable[nn.Module] | None, states: Iterable[nn.Module | nn.Parameter] | None
) -> tuple[set[nn.Parameter], set[nn.Module]]:
    """Parameters that stay as they are, and modules that are not wrapped."""
    if modules is not None and states is not None:
        raise ValueError("ignored_modules and ignored_states: expected one of them")
    parameters: set[nn.Parameter] = set()
    ignored: set[nn.Module] = set()
    for state in (*(modules or ()), *(states or ())):
        if isinstance(state, nn.Module):
            ignored.update(state.modules())
            parameters.update(state.parameters())
        elif isinstance(state, nn.Parameter):
            parameters.add(state)
        else:
            raise TypeError(f"ignored: found a {type(state).__name__}, expected modules or parameters")
    return parameters, ignored


def chosen(
    root: nn.Module, policy: Policy | None, ignored: set[nn.Parameter], ignored_modules: set[nn.Module]
) -> list[nn.Module]:
    """Modules beneath `root` that are sharded on their own, children first.

    policy: as auto_wrap_policy, a function of (module, recurse, nonwrapped_numel) such as ModuleWrapPolicy or a partial
    of transformer_auto_wrap_policy or size_based_auto_wrap_policy; or classes.
    """
    found: list[nn.Module] = []
    if policy is None:
        return found
    if not callable(policy):
        if not isinstance(policy, Iterable):
            raise TypeError(
                f"auto_wrap_policy is a {type(policy).__name__}, expected ModuleWrapPolicy, a function of (module, "
                "recurse, nonwrapped_numel), or classes"
            )
        classes = tuple(policy)
        policy = lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, classes)  # noqa: E731
    decide: Callable[..., bool] = policy
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> int:
        """Elements beneath that are now wrapped."""
        if module in seen or module in ignored_modules:
            return 0
        seen.add(module)
        numel = sum(p.numel() for p in module.parameters() if p not in ignored)
        if not decide(module=module, recurse=True, nonwrapped_numel=numel):
            return 0
        wrapped = sum(visit(child) for child in module.children())
        own = numel - wrapped
        if module is not root and own and decide(module=module, recurse=False, nonwrapped_numel=own):
            found.append(module)
            return numel
        return wrapped

    visit(root)
    return found


def check_obsolete(
    backward_prefetch: object, forward_prefetch: bool, limit_all_gathers: bool, use_orig_params: bool | None
) -> None:
    """Warn of what FSDP2 does in one way only."""
    if backward_prefetch is not BackwardPrefetch.BACKWARD_PRE:
        warn_once("backward_prefetch", "has no effect: FSDP2 prefetches as BACKWARD_PRE does")
    if forward_prefetch:
        warn_once("forward_prefetch", "has no effect: use set_modules_to_forward_prefetch on the FSDP modules")
    if not limit_all_gathers:
        warn_once("limit_all_gathers", "has no effect: FSDP2 never runs ahead of its streams")
    if use_orig_params is False:
        warn_once("use_orig_params", "has no effect: parameters are always the module's own")


def broadcast(tensors: Sequence[torch.Tensor], groups: Iterable[dist.ProcessGroup]) -> None:
    """Rank 0's values on all ranks, group by group."""
    for group in groups:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group_src=0, group=group)
