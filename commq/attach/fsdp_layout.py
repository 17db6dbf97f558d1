"""What FSDP2 says about a parameter group: the only file that touches what PyTorch keeps private.

A group's parameters travel together. FSDP cuts each into W shards along one dimension, pads them to one length, and
puts them side by side, so that both of its collectives see rows: row w is what belongs to rank w. An all-gather has all
parameters of the group, a reduce-scatter those that have a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """A parameter's part of a row."""

    name: str
    """As in the root module's named_parameters()."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    numel: int
    """Elements of a shard, padding included: the same on all ranks."""
    valid: tuple[int, ...]
    """Elements of each rank's shard that are not padding; they come first."""
    dim: int
    """Along which the parameter is cut."""

    @property
    def even(self) -> bool:
        """No rank's shard has padding."""
        return min(self.valid) == self.numel


def cut_shard(name: str, shape: tuple[int, ...], dim: int, world_size: int) -> Shard:
    """As FSDP2 cuts a parameter."""
    rest = int(torch.Size(shape[:dim] + shape[dim + 1 :]).numel())
    step = -(-shape[dim] // world_size)
    valid = tuple(min(max(shape[dim] - rank * step, 0), step) * rest for rank in range(world_size))
    return Shard(name, shape, step * rest, valid, dim)


def fsdp_modules(root: nn.Module) -> Iterator[tuple[str, FSDPModule]]:
    """FSDP modules beneath `root` and itself, by name, one for each that was sharded together with others."""
    seen: set[int] = set()
    for name, module in root.named_modules():
        if isinstance(module, FSDPModule):
            with _private(name):
                state = module._get_fsdp_state()
            if id(state) not in seen:
                seen.add(id(state))
                yield name, module


def is_root(module: nn.Module) -> bool:
    """Whether `module` is what FSDP2 found to be its root, which it does when the first forward pass begins."""
    with _private(type(module).__name__):
        return cast(FSDPModule, module)._get_fsdp_state()._is_root is True


class GroupLayout:
    """The parameter group of one FSDP module. Raises ValueError for what cannot be compressed, with the reason.

    names: of the root's parameters, by id.
    """

    def __init__(self, module: FSDPModule, names: Mapping[int, str], where: str) -> None:
        with _private(where):
            state = module._get_fsdp_state()
            # torch 2.13 allows several groups in a module; before, there was one or none.
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:
                groups = [group for group in (state._fsdp_param_group,) if group is not None]
        if len(groups) > 1:
            raise ValueError(
                f"{where}: its parameters are sharded over several meshes (shard_placement_fn), and FSDP2 takes custom "
                "collectives only for one; call fully_shard on the submodules of each mesh, such as the experts, apart"
            )
        self.empty = not groups
        """The module has no parameters of its own: nothing travels."""
        self._where = where
        if self.empty:
            return
        with _private(where):
            self._group = groups[0]
            self._params: Sequence[Any] = self._group.fsdp_params
            mesh = self._group.mesh_info
            if not hasattr(mesh, "shard_process_group") or hasattr(mesh, "replicate_process_group"):
                raise ValueError(
                    f"{where}: native HSDP's all-reduce cannot be replaced; pass the two-dimensional mesh to "
                    "commq.fully_shard instead of torch's"
                )
            self.process_group: dist.ProcessGroup = mesh.shard_process_group
            self.world_size: int = mesh.shard_mesh_size
            self.shards = tuple(self._shard(p, names) for p in self._params)
        self._touched: set[int] = set()

    def _shard(self, param: Any, names: Mapping[int, str]) -> Shard:
        sharded: nn.Parameter = param.sharded_param
        name = names.get(id(sharded), f"{self._where}.{param._module_info.param_name}")
        local = cast(DTensor, sharded).to_local()
        if hasattr(local, "fsdp_pre_all_gather"):
            raise ValueError(
                f"{name} is a {type(local).__name__}, which brings its own all-gather format; leave it "
                "to torch's fully_shard, or use plain parameters"
            )
        if sharded.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {sharded.dtype}, expected float32, bfloat16 or float16")
        return cut_shard(name, tuple(param._orig_size), param.fsdp_placement.dim, self.world_size)

    @property
    def divide_factor(self) -> float | None:
        """What the user set with set_gradient_divide_factor."""
        factor: float | None = self._group.gradient_divide_factor
        return factor

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Those that were sharded together: one, unless fully_shard was given a list."""
        return tuple(self._group.modules)

    @property
    def all_reduces(self) -> bool:
        """False while the user accumulates shards with set_requires_all_reduce(False)."""
        return bool(self._group.all_reduce_grads)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of what the group's all-gather sends."""
        policy = self._group.mp_policy.param_dtype
        return {policy or p.sharded_param.dtype for p in self._params}

    def watch(self) -> bool:
        """From now on remember which parameters get a gradient: a reduce-scatter has only those.

        To be called after the first unshard, when the parameters that autograd sees exist. Returns whether it was.
        """
        with _private(self._where):
            unsharded = [p._unsharded_param for p in self._params if hasattr(p, "_unsharded_param")]
        if len(unsharded) < len(self._params):
            return False
        for i, parameter in enumerate(unsharded):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._touched.add(i))
        return True

    def reduced(self, row_numel: int) -> tuple[int, ...]:
        """Numbers of the parameters in a reduce-scatter whose rows have `row_numel` elements."""
        touched = sorted(self._touched)
        self._touched.clear()
        trainable = [i for i, p in enumerate(self._params) if p.sharded_param.requires_grad]
        for found in (trainable, touched):
            if sum(self.shards[i].numel for i in found) == row_numel:
                return tuple(found)
        raise RuntimeError(
            f"rank {dist.get_rank()}, {self._where}: FSDP reduces rows of {row_numel} elements, which are neither all "
            f"trainable parameters nor the {len(touched)} that were seen to get a gradient; call "
            "set_reduce_scatter_unused_params(True) on the module, or freeze parameters before the first step"
        )


@contextmanager
def _private(where: str) -> Iterator[None]:
    try:
        yield
    except AttributeError as error:
        raise RuntimeError(
            f"{where}: torch {torch.__version__} keeps FSDP2's parameter groups in another place than commq knows "
            f"({error}); use a torch release from 2.11 to 2.13, or a newer commq"
        ) from error
