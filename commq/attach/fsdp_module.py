"""FSDP: the constructor of FullyShardedDataParallel, over FSDP2 and commq's encoded communication.

    model = commq.FSDP(model, recipe="full-shard", auto_wrap_policy={Block})

Parameters are DTensors under the names they had, state dicts are FSDP2's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)
from torch.distributed.tensor import DTensor

from commq.attach import fsdp_arguments as arguments
from commq.attach.fsdp import fully_shard, handle_of
from commq.recipe import Recipe


class FSDP(nn.Module):
    """Shard `module` in place and wrap it. All ranks call it with the same arguments.

    recipe: a Recipe, or what `commq.recipe` takes; by default "full-shard" for FULL_SHARD, "sdp4bit" for SHARD_GRAD_OP,
    "hybrid-shard" for HYBRID_SHARD and NO_SHARD. The other arguments are FullyShardedDataParallel's:
    sharding_strategy: torch's ShardingStrategy or its name. process_group: a group; for HYBRID_SHARD a pair (shard,
    replicate). device_mesh: one dimension, or two named ones (replicate, shard). cpu_offload: CPUOffload, an
    OffloadPolicy or a bool. auto_wrap_policy: see `fsdp_arguments.chosen`. mixed_precision: MixedPrecision or
    MixedPrecisionPolicy. ignored_modules or ignored_states. param_init_fn: called on each module with parameters on
    the meta device; by default to_empty and reset_parameters. device_id: where to move the module first.
    sync_module_states: start from rank 0's parameters and buffers.
    Those that mean nothing to FSDP2 (backward_prefetch, forward_prefetch, limit_all_gathers, use_orig_params) warn once
    if they ask for something else. Raises TypeError, ValueError for what cannot be.
    """

    def __init__(
        self,
        module: nn.Module,
        process_group: dist.ProcessGroup | tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        sharding_strategy: ShardingStrategy | str | None = None,
        cpu_offload: CPUOffload | OffloadPolicy | bool | None = None,
        auto_wrap_policy: arguments.Policy | None = None,
        backward_prefetch: BackwardPrefetch | None = BackwardPrefetch.BACKWARD_PRE,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
        ignored_modules: Iterable[nn.Module] | None = None,
        param_init_fn: Any = None,
        device_id: int | torch.device | None = None,
        sync_module_states: bool = False,
        forward_prefetch: bool = False,
        limit_all_gathers: bool = True,
        use_orig_params: bool | None = None,
        ignored_states: Iterable[nn.Module | nn.Parameter] | None = None,
        device_mesh: DeviceMesh | None = None,
        *,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        arguments.check_obsolete(backward_prefetch, forward_prefetch, limit_all_gathers, use_orig_params)
        strategy = arguments.strategy_of(sharding_strategy)
        ignored, ignored_set = arguments.ignored_of(ignored_modules, ignored_states)
        device = _device(device_id, module)
        mesh = arguments.mesh_of(strategy, device_mesh, process_group, device.type)
        groups = [mesh.get_group(dim) for dim in reversed(range(mesh.ndim))]
        keeps = strategy in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy._HYBRID_SHARD_ZERO2)
        wrapped = arguments.chosen(module, auto_wrap_policy, ignored, ignored_set)
        for each in (*wrapped, module):
            policy, buffer_dtype = arguments.precision_of(mixed_precision, root=each is module)
            _prepare(each, device, param_init_fn, buffer_dtype, groups if sync_module_states else ())
            fully_shard(
                each,
                mesh=mesh,
                recipe=recipe,
                backend=backend,
                reshard_after_forward=False if keeps else None if each is module else True,
                mp_policy=policy,
                offload_policy=arguments.offload_of(cpu_offload),
                ignored_params=ignored or None,
            )
        self.module = module
        self.handle = handle_of(module)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names they have in the wrapped module."""
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Under the names they have in the wrapped module."""
        return self.module.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's: DTensors, for torch.distributed.checkpoint."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of DTensors, as from `state_dict`."""
        return self.module.load_state_dict(*args, **kwargs)

    def full_state_dict(self, *, cpu_offload: bool = True) -> dict[str, Any]:
        """Whole parameters and buffers, never encoded. All ranks call it; with cpu_offload only rank 0 gets them."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
        return get_model_state_dict(self.module, options=options)

    def load_full_state_dict(self, state: dict[str, Any], *, broadcast: bool = False) -> None:
        """Load whole parameters; with `broadcast` rank 0's, and the others' state is not looked at."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_model_state_dict(self.module, state, options=options)
        self.handle.forget()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the averaged gradients so that their norm is at most max_norm. Returns the norm they had."""
        norm = nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients of whole parameters on each rank, without sending anything."""
        root = cast(FSDPModule, self.module)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    @staticmethod
    @contextmanager
    def summon_full_params(
        module: nn.Module,
        recurse: bool = True,
        writeback: bool = True,
        rank0_only: bool = False,
        offload_to_cpu: bool = False,
        with_grads: bool = False,
    ) -> Iterator[None]:
        """Within, the module's parameters are whole plain tensors: the masters, never encoded.

        writeback: afterwards each rank's shard is what that rank's whole parameter holds. All ranks, outside of forward
        and backward.
        """
        if rank0_only and writeback:
            raise ValueError("summon_full_params: writeback with rank0_only, expected one of them")
        inner = module.module if isinstance(module, FSDP) else module
        for each in inner.modules():
            if isinstance(each, FSDPModule):
                each.reshard()
        owners = list(inner.modules()) if recurse else [inner]
        found = [(m, name, p) for m in owners for name, p in m._parameters.items() if p is not None and _is_sharded(p)]
        wholes: dict[nn.Parameter, nn.Parameter] = {}
        for owner, name, sharded in found:
            if sharded not in wholes:
                wholes[sharded] = _whole(sharded, offload_to_cpu, with_grads)
            if not rank0_only or dist.get_rank() == 0:
                _set(owner, name, wholes[sharded])
        try:
            yield
        finally:
            for owner, name, sharded in found:
                _set(owner, name, sharded)
            if writeback:
                for sharded, whole in wholes.items():
                    _write_back(cast(DTensor, sharded), whole)
                if isinstance(module, FSDP):
                    module.handle.forget()


def _device(device_id: int | torch.device | None, module: nn.Module) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if device_id is not None:
        kind = accelerator.type if accelerator else "cpu"
        device = torch.device(kind, device_id) if isinstance(device_id, int) else torch.device(device_id)
    else:
        found = {tensor.device for tensor in (*module.parameters(), *module.buffers())} - {torch.device("meta")}
        device = found.pop() if len(found) == 1 else torch.device(accelerator.type if accelerator else "cpu")
        if device.type == "cpu" and accelerator is not None:
            device = torch.device(accelerator.type)
    if device.type == "cuda":
        current = torch.cuda.current_device()
        if device.index not in (None, current):
            raise ValueError(
                f"device_id={device} and the current device is cuda:{current}; call torch.cuda.set_device first"
            )
        device = torch.device("cuda", current)
    return device


def _prepare(
    module: nn.Module,
    device: torch.device,
    param_init_fn: Any,
    buffer_dtype: torch.dtype | None,
    groups: Iterable[dist.ProcessGroup],
) -> None:
    """Parameters and buffers that are not sharded yet: materialise, move, cast, make equal on all ranks."""
    for each in module.modules():
        own = [*each.parameters(recurse=False), *each.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own if not isinstance(tensor, DTensor)):
            if param_init_fn is not None:
                param_init_fn(each)
                continue
            reset = getattr(each, "reset_parameters", None)
            each.to_empty(device=device, recurse=False)
            if reset is None and not groups:
                raise ValueError(
                    f"{type(each).__name__} has parameters on the meta device and no reset_parameters; pass "
                    "param_init_fn, or sync_module_states=True with real parameters on rank 0"
                )
            if reset is not None:
                reset()
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer_dtype is not None and buffer.is_floating_point():
                buffer.data = buffer.data.to(buffer_dtype)
        tensors = [t for t in (*module.parameters(), *module.buffers()) if not isinstance(t, DTensor)]
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        arguments.broadcast(tensors, groups)


def _whole(sharded: nn.Parameter, offload_to_cpu: bool, with_grads: bool) -> nn.Parameter:
    full = cast(DTensor, sharded.detach()).full_tensor()
    whole = nn.Parameter(full.cpu() if offload_to_cpu else full, requires_grad=sharded.requires_grad)
    if with_grads and sharded.grad is not None:
        grad = cast(DTensor, sharded.grad).full_tensor()
        whole.grad = grad.cpu() if offload_to_cpu else grad
    return whole


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor)


def _set(owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner._parameters[name] = parameter


@torch.no_grad()
def _write_back(sharded: DTensor, whole: nn.Parameter) -> None:
    """Each rank cuts its own shard out of its own whole parameter: no rank asks another."""
    mesh, placement = sharded.device_mesh, sharded.placements[-1]
    dim = cast(Any, placement).dim
    pieces = whole.detach().chunk(mesh.size(mesh.ndim - 1), dim=dim)
    rank = mesh.get_local_rank(mesh.ndim - 1)
    local = sharded.to_local()
    if local.numel():
        local.copy_(pieces[rank])
