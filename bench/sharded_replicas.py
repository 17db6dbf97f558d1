"""Sharded training of W ranks in one process: what bench/replicas.py is to DDP, for commq.fully_shard.

After a gather all ranks compute in the same weights, so one copy of the model is enough, and each part of the float32
masters has one owner anyway; what differs from rank to rank, the gradients and commq's state, is there W times. Weights
and gradients travel by the very objects that FSDP2 calls, `WeightGather`, `GradientScatter` and `BetweenHosts`, each
rank in a thread of its own; tests/test_convergence_sharded.py holds the result to the bits of real processes. The
backward pass of full sharding gathers the bits of the forward pass again: its bytes are counted, and not moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.utils._pytree import tree_map

import commq
from commq.attach.fsdp import check_recipe
from commq.attach.fsdp_handle import ShardHandle
from commq.collectives.hosts import HOSTS, Hosts
from commq.train.config import OptimizerConfig
from commq.train.model import next_byte_loss
from commq.train.optimizer import make_optimizer
from passes import Passes
from sharded_unit import ShardedUnit
from thread_ranks import Ranks


class ShardedReplicas:
    """W ranks that train `model` together; each block is a unit, and what remains is one.

    hosts: how many the ranks pretend to be on. hybrid: parameters are shared out inside a host, and an all-reduce
    follows between hosts (HSDP). Else all ranks share them out, and keep what they gathered after the forward pass if
    the recipe sends differences. dtype: what weights are gathered and computed in; gradients travel as float32.
    """

    def __init__(
        self,
        recipe: commq.Recipe,
        model: nn.Module,
        optimizer: OptimizerConfig,
        world_size: int,
        *,
        hosts: int = 1,
        hybrid: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_recipe(recipe, None, hybrid=hybrid)
        check_hosts(world_size, hosts, hybrid=hybrid)
        self.model, self.ranks = model, Ranks(world_size)
        grid = torch.arange(world_size).view(hosts, -1)
        for transport in self.ranks.transports:
            transport.memory.facts[HOSTS] = Hosts.of([rank // grid.shape[1] for rank in range(world_size)])
        inner, outer = self.ranks.transports, None
        if hybrid:
            inner, outer = self.ranks.split(grid.tolist()), self.ranks.split(grid.T.tolist())
        names = [name for name, _ in model.named_parameters()]
        parts = _units(model)
        self.units = [
            ShardedUnit(number, named, recipe, inner, outer, dtype) for number, named in enumerate(parts.values())
        ]
        self.handles = [
            ShardHandle({name: unit.ends[rank] for name, unit in zip(parts, self.units, strict=True)})
            for rank in range(world_size)
        ]
        self._secondary = grid.shape[1] if recipe.secondary and 1 < grid.shape[1] < world_size else 0
        if recipe.weights_difference:
            self._gathered_twice = []
        else:  # the root keeps its own parameters, where fully_shard is not told otherwise
            self._gathered_twice = self.units if self._secondary else self.units[1:]
        masters = {name: shards for unit in self.units for name, shards in unit.masters.items()}
        self.masters = {name: masters[name] for name in names}
        """The shards of each parameter, in float32."""
        self._shards = nn.ParameterList(shard for shards in self.masters.values() for shard in shards)
        self.optimizer = make_optimizer(self._shards, optimizer)
        self._clip = optimizer.clip or float("inf")
        self._fresh = False
        for module in (*model.blocks, model):  # type: ignore[misc]
            module.register_forward_pre_hook(lambda _, args: tree_map(lambda x: _cast(x, dtype), args))
        self._passes = Passes(self._find_gradients, self.units[0].device)

    def step(self, tokens_WBT: Tensor, rate: float) -> Tensor:
        """One optimizer step. tokens: int64, T = context + 1, one batch for each rank. Returns the loss of each."""
        self._gather()
        losses_W = self._passes(tokens_WBT)
        self.ranks.run(self._scatter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clip_grads_with_norm_(self._shards, self._clip, self._norm())
        self.optimizer.step()
        self._fresh = False
        return losses_W

    @property
    def sent_bytes(self) -> int:
        """By rank 0."""
        return self.handles[0].stats().sent_bytes

    @property
    def raw_bytes(self) -> int:
        """What fp32 would have taken."""
        return self.handles[0].stats().raw_bytes

    def observe(self, loss: float) -> None:
        """Tell recipes with phases that end by the loss what it is."""
        for unit in self.units:
            for end in unit.ends:
                if end.unit.progress.wants_loss:
                    end.unit.progress.observe(loss)

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean loss of sequences under the gathered weights; the next step computes in those, too, as with FSDP2."""
        self._gather()
        return next_byte_loss(self.model(tokens_BT[:, :-1]), tokens_BT[:, 1:])

    def _gather(self) -> None:
        if self._fresh:
            return

        def gather(rank: int) -> None:
            for unit in self.units:
                unit.gather(rank)

        self.ranks.run(gather)
        self._fresh = True

    def _scatter(self, rank: int) -> None:
        for unit in self._gathered_twice:
            unit.count_again(rank, self._secondary)
        for unit in reversed(self.units):
            unit.scatter(rank)

    def _find_gradients(self, rank: int, tokens_BT: Tensor) -> Tensor:
        loss = self.loss(tokens_BT)
        gradients = iter(torch.autograd.grad(loss, [p for unit in self.units for p in unit.parameters]))
        with torch.no_grad():
            for unit in self.units:
                unit.put_gradients(rank, [next(gradients) for _ in unit.parameters])
        return loss.detach()

    def _norm(self) -> Tensor:
        """Of all gradients: first of each parameter over its shards, as that of DTensors is found."""
        norms = torch.stack(torch._foreach_norm([shard.grad for shard in self._shards]))
        return torch.linalg.vector_norm((norms.view(-1, self.units[0].sharers) ** 2).sum(dim=1) ** 0.5)


def check_hosts(world_size: int, hosts: int, *, hybrid: bool) -> None:
    """ValueError for hosts that the ranks cannot be on."""
    if hosts < 1 or world_size % hosts:
        raise ValueError(f"{world_size} ranks on {hosts} hosts: expected as many on each")
    if hybrid and not 1 < hosts < world_size:
        raise ValueError(f"HSDP with {world_size} ranks, hosts: {hosts}; expected several, of several ranks each")


def _units(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The named parameters of each FSDP module, as commq numbers them: the root's own first."""
    units: dict[str, list[tuple[str, nn.Parameter]]] = {"": []}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        units.setdefault(".".join(parts[:2]) if parts[0] == "blocks" else "", []).append((name, parameter))
    return units


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """FSDP2's mixed precision casts whatever goes into a unit."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
