"""FSDP2: fully sharded training whose all-gathers and reduce-scatters are encoded.

    for block in model.blocks:
        commq.fully_shard(block, recipe="full-shard")      # in place of torch's fully_shard
    commq.fully_shard(model, recipe="full-shard")
    handle = commq.handle_of(model)                        # bytes, state

It works through FSDP2's own seams, set_custom_all_gather, set_custom_reduce_scatter and set_all_reduce_hook, so what
FSDP2 does besides (prefetching, mixed precision, offloading, accumulation, checkpoints) stays FSDP2's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from commq.attach.agree import agree_on_recipe
from commq.attach.fsdp_attached import Attached
from commq.attach.fsdp_between import BetweenHosts
from commq.attach.fsdp_gather import WeightGather
from commq.attach.fsdp_handle import ShardHandle
from commq.attach.fsdp_layout import GroupLayout, fsdp_modules, is_root
from commq.attach.fsdp_scatter import GradientScatter
from commq.attach.fsdp_unit import Unit
from commq.collectives.hosts import find_hosts
from commq.collectives.transport import C10d
from commq.policy.rule import check_rules
from commq.recipe import Recipe

_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")
"""What wrappers of torch put into the names of parameters."""
_SCHEDULES = ("two_shot", "two_hop", "auto")
# Kept on the modules themselves, so that they go when the modules go.
_ATTACHED, _HANDLE = "_commq_attached", "_commq_handle"


def fully_shard(
    module: nn.Module | list[nn.Module],
    *,
    mesh: DeviceMesh | None = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> Any:
    """torch's fully_shard, with encoded communication for `module` and every FSDP module beneath it; returns `module`.

    Call it bottom-up, as torch's; modules beneath that were sharded by torch's fully_shard get this call's recipe,
    those sharded by this one keep theirs. Call it on the root last, on every rank; `handle_of(root)` is the handle.
    mesh: of one dimension; or of two (replicate, shard), which is HSDP: shards inside the second, an encoded all-reduce
    with error feedback over the first. recipe: a Recipe or what `commq.recipe` takes; by default "hybrid-shard" with
    such a mesh, "sdp4bit" with reshard_after_forward=False, else "full-shard".
    With schedule "auto" a unit's gathers and scatters are encoded where that is measured to be faster, when they are
    first made, by all ranks together; elsewhere FSDP2's own collectives run, with FSDP2's bits. HSDP: each host decides
    for what stays inside it; the all-reduce between hosts is always encoded.
    kwargs: torch's. A recipe with weights_difference keeps parameters after the forward pass; one with secondary shards
    keeps a host's share of them.
    Raises ValueError, the same on every rank, if the ranks' recipes differ, and for what cannot be compressed. Rules
    are about the root's names, so one that matches none of them is an error in the root's first forward pass.
    """
    if kwargs.get("dp_mesh_dims") is not None:
        raise ValueError(
            "dp_mesh_dims (parameters on a full SPMD mesh) is not supported; pass the data-parallel mesh as mesh"
        )
    mesh = mesh or _default_mesh()
    shard_mesh, outer = _split(mesh)
    groups = [shard_mesh.get_group(), *([outer] if outer else [])]
    resolved = _resolve(recipe, kwargs.get("reshard_after_forward"), groups, hybrid=outer is not None)
    kwargs = kwargs | _resharding(resolved, C10d(groups[0]), kwargs.get("reshard_after_forward"))
    torch_fully_shard(module, mesh=shard_mesh, **kwargs)
    for each in [module] if isinstance(module, nn.Module) else module:
        attach(each, resolved, outer, backend=backend)
    return module


def handle_of(module: nn.Module) -> ShardHandle:
    """The handle of a module that `fully_shard` was called on: bytes, state. KeyError for any other."""
    handle = getattr(module, _HANDLE, None)
    if not isinstance(handle, ShardHandle):
        raise KeyError(f"{type(module).__name__} was not given to commq.fully_shard; pass the root module that was")
    return handle


def attach(root: nn.Module, recipe: Recipe, outer: dist.ProcessGroup | None, *, backend: str = "auto") -> ShardHandle:
    """Put commq's collectives into all FSDP modules of `root` that have none, and number and name all of them."""
    names = {id(parameter): _WRAPPERS.sub("", name) for name, parameter in root.named_parameters()}
    units: dict[str, Attached] = {}
    for where, module in fsdp_modules(root):
        layout = GroupLayout(module, names, where)
        if layout.empty:
            continue
        known = getattr(module, _ATTACHED, None)
        if known is None:
            known = _attach(module, layout, Unit(layout, recipe, 0, hybrid=outer is not None, backend=backend), outer)
            for each in layout.modules:
                setattr(each, _ATTACHED, known)
        known.unit.layout.shards = layout.shards  # with the names that this root gives
        known.unit.number = len(units)
        units[where] = known
    parameters = [shard.name for each in units.values() for shard in each.unit.layout.shards]
    handle = ShardHandle(units)
    setattr(root, _HANDLE, handle)
    if isinstance(root, FSDPModule) and parameters and recipe.rules:
        _check_rules(root, recipe, parameters)
    return handle


def _check_rules(module: nn.Module, recipe: Recipe, names: list[str]) -> None:
    """When the first forward pass begins, and `module` turns out to be the root, whose names the rules are about."""

    @torch.compiler.disable
    def look(*_: Any) -> None:
        if is_root(module):
            check_rules(recipe.rules, names)
        registered.remove()

    registered = module.register_forward_pre_hook(look)


def _attach(module: Any, layout: GroupLayout, unit: Unit, outer: dist.ProcessGroup | None) -> Attached:
    gather, scatter = WeightGather(unit), GradientScatter(unit)
    if len(layout.dtypes) > 1:
        raise ValueError(
            f"the parameters of one FSDP module are gathered as {sorted(map(str, layout.dtypes))}, expected one "
            "dtype; set mp_policy's param_dtype, or call fully_shard on submodules of one dtype each"
        )
    between = None
    if not unit.hybrid:
        find_hosts(unit.transport(layout.process_group))  # collective, so not in the middle of a backward pass
    module.set_custom_all_gather(gather)
    module.set_custom_reduce_scatter(scatter)
    if outer is not None and dist.get_world_size(outer) > 1:
        between = BetweenHosts(unit, outer)
        module.set_all_reduce_hook(between)
    for each in layout.modules:
        each.register_load_state_dict_post_hook(lambda *_: gather.forget())
        _watch(each, layout)
    return Attached(unit, gather, scatter, between)


def _watch(module: nn.Module, layout: GroupLayout) -> None:
    @torch.compiler.disable
    def look(*_: Any) -> None:
        if layout.watch():
            registered.remove()

    registered = module.register_forward_pre_hook(look)


def _default_mesh() -> DeviceMesh:
    if not dist.is_initialized():
        raise RuntimeError("fully_shard: torch.distributed is not initialised; call dist.init_process_group first")
    accelerator = torch.accelerator.current_accelerator()
    return init_device_mesh(accelerator.type if accelerator else "cpu", (dist.get_world_size(),))


def _split(mesh: DeviceMesh) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """The mesh to shard on, and the group to reduce over afterwards."""
    if mesh.ndim == 1:
        return mesh, None
    names = mesh.mesh_dim_names
    if mesh.ndim != 2 or names is None:
        raise ValueError(
            f"mesh of {mesh.ndim} dimensions named {names}, expected one, or two with names: (replicate, shard), such "
            'as init_device_mesh("cuda", (hosts, ranks), mesh_dim_names=("replicate", "shard"))'
        )
    return mesh[names[1]], mesh.get_group(names[0])


def _resolve(recipe: object, reshard: object, groups: list[dist.ProcessGroup], *, hybrid: bool) -> Recipe:
    """The recipe that all ranks agree on; the same error on every rank if they do not."""
    if recipe is None:
        recipe = "hybrid-shard" if hybrid else "sdp4bit" if reshard is False else "full-shard"
    return agree_on_recipe(recipe, map(C10d, groups), partial(check_recipe, reshard=reshard, hybrid=hybrid))


def check_recipe(recipe: Recipe, reshard: object, *, hybrid: bool) -> None:
    """ValueError for a recipe that sharded training cannot follow. reshard: torch's reshard_after_forward."""
    if recipe.schedule not in _SCHEDULES:
        raise ValueError(
            f"recipe {recipe.name!r} has schedule {recipe.schedule!r}, which is one of all-reduces; sharded training "
            f"takes {', '.join(_SCHEDULES)}"
        )
    if hybrid and (recipe.secondary or recipe.weights_difference):
        raise ValueError(
            f"recipe {recipe.name!r} with a mesh of two dimensions: weights are gathered inside a host only, so "
            "secondary shards and differences bring nothing; use hybrid-shard"
        )
    if hybrid and recipe.answer_feedback.rule != "none":
        raise ValueError(f"recipe {recipe.name!r}: answer_feedback is not kept between hosts; drop it")
    if recipe.weights_difference and reshard not in (None, False):
        raise ValueError(
            f"recipe {recipe.name!r} sends weights as differences, which needs reshard_after_forward=False, found "
            f"{reshard!r}: each gather would refine the parameters between forward and backward"
        )


def _resharding(recipe: Recipe, transport: C10d, given: object) -> dict[str, Any]:
    """What the recipe says about parameters after the forward pass."""
    if recipe.weights_difference:
        return {"reshard_after_forward": False}
    if not recipe.secondary:
        return {}
    hosts = find_hosts(transport)
    ranks = hosts.ranks_per_host
    if ranks is None or any(
        members != tuple(range(members[0], members[0] + len(members))) for members in hosts.members
    ):
        raise ValueError(
            f"secondary shards need hosts of equally many neighbouring ranks, found {hosts.members}; drop secondary"
        )
    if given not in (None, True, ranks):
        raise ValueError(f"secondary shards stay on the {ranks} ranks of a host, found reshard_after_forward={given!r}")
    return {"reshard_after_forward": ranks} if 1 < ranks < transport.world_size else {}
