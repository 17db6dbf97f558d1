"""The trainer of `--parallel fsdp` and `hsdp`: the same steps on sharded parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import commq
from commq.collectives.hosts import find_hosts
from commq.collectives.transport import C10d
from commq.train.model import Block
from commq.train.optimizer import make_optimizer
from commq.train.trainer import Trainer

Group = dist.ProcessGroup | tuple[dist.ProcessGroup, dist.ProcessGroup]


class ShardedTrainer(Trainer):
    """One rank of a run with commq.FSDP: FULL_SHARD, or HYBRID_SHARD between hosts; a block is a unit.

    A recipe that sends weights as differences keeps parameters after the forward pass (SHARD_GRAD_OP).
    """

    def _attach(self, model: nn.Module, recipe: commq.Recipe) -> tuple[Any, Any, Optimizer]:
        strategy, group = "SHARD_GRAD_OP" if recipe.weights_difference else "FULL_SHARD", self.ranks.group
        groups: Group = group
        if self.config.parallel == "hsdp":
            strategy, groups = "HYBRID_SHARD", _groups(dist.get_backend(group))
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.ranks.device.type == "cuda" else None
        sharded = commq.FSDP(
            model,
            groups,
            strategy,
            mixed_precision=precision,
            auto_wrap_policy={Block},
            device_id=self.ranks.device,
            recipe=recipe,
        )
        return sharded, sharded.handle, make_optimizer(model, self.config.optimizer, self.config.seed)

    def _clip(self) -> Tensor:
        norm = super()._clip()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def common_state(self) -> dict[str, Any]:
        """Whole parameters and optimizer state, on rank 0; all ranks call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return self._progress() | {
            "model": get_model_state_dict(self.ddp.module, options=options),
            "optimizer": get_optimizer_state_dict(self.ddp.module, self.optimizer, options=options),
        }

    def fold(self, handles: list[dict[str, Any]]) -> dict[str, Any]:
        replicas, world_size = self.handle.mesh
        return commq.fold(handles, world_size, replicas=replicas)[self.handle.rank]

    def _load_common(self, common: dict[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.ddp.module, common["model"], options=options)
        set_optimizer_state_dict(self.ddp.module, self.optimizer, common["optimizer"], options=options)


def _groups(backend: str) -> Group:
    """This rank's groups: those of its host, which share parameters out, and those of its number on every host."""
    hosts = find_hosts(C10d())
    if hosts.ranks_per_host is None:
        raise ValueError(f"--parallel hsdp: hosts of ranks {hosts.members}, expected as many on every one; use fsdp")
    across = list(zip(*hosts.members, strict=True))
    found: list[dist.ProcessGroup] = []
    for ranks in (*hosts.members, *across):
        group = dist.new_group(list(ranks), backend=backend)
        if dist.get_rank() in ranks:
            found.append(group)
    return found[0], found[1]
