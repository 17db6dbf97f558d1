"""Handle: what commq keeps for a sharded module, over all of its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from commq.attach.dcp import count_states, pack_state, read_states
from commq.attach.fsdp_attached import Attached
from commq.attach.fsdp_state import fold_shards, load_unit, unit_state


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """Totals of this rank since the start (or since its state was loaded)."""

    steps: int
    """Reductions of gradients: one a step, one a micro-batch where those are reduced."""
    raw_bytes: int
    """Bytes this rank would have sent with fp32 on the same path."""
    sent_bytes: int
    """Bytes this rank sent, scales, exemptions and padding included."""
    weight_bytes: int
    """Of those sent, for parameters; the others are gradients'."""
    leaving_bytes: int
    """Of those sent, to other hosts; where exchanges are flat, counted as an all-to-all."""
    residual_norm: float
    """2-norm of all residuals of this rank."""

    @property
    def ratio(self) -> float:
        """sent_bytes / raw_bytes; 1.0 if nothing had to be sent."""
        return self.sent_bytes / self.raw_bytes if self.raw_bytes else 1.0


class ShardHandle:
    """units: by the name of their FSDP module."""

    def __init__(self, units: Mapping[str, Attached]) -> None:
        self.units = dict(units)

    def stats(self) -> ShardStats:
        """Totals so far. Waits for the device if there are residuals."""
        every = [traffic for each in self.units.values() for traffic in each.traffics.values()]
        norms = [r.norm() for each in self.units.values() for r in each.residuals.values()]
        return ShardStats(
            steps=max((each.unit.steps for each in self.units.values()), default=0),
            raw_bytes=sum(traffic.raw for traffic in every),
            sent_bytes=sum(traffic.sent for traffic in every),
            weight_bytes=sum(each.unit.weights.sent for each in self.units.values()),
            leaving_bytes=sum(traffic.leaving for traffic in every),
            residual_norm=sum(norm * norm for norm in norms) ** 0.5,
        )

    def observe(self, loss: float) -> None:
        """Tell phases that end by the loss what it is; every rank calls it, and the largest of their losses counts."""
        waiting = [each.unit.progress for each in self.units.values() if each.unit.progress.wants_loss]
        if waiting:
            losses: list[Any] = [0.0] * dist.get_world_size()
            dist.all_gather_object(losses, float(loss))
            for progress in waiting:
                progress.observe(max(losses))

    def set_loss_scale(self, loss_scale: float) -> None:
        """Tell the residuals that the loss, and so the gradients, are multiplied by `loss_scale` from now on."""
        for each in self.units.values():
            for residual in each.residuals.values():
                residual.set_loss_scale(loss_scale)

    def forget(self) -> None:
        """Parameters were replaced other than by load_state_dict: send them as they are next time. On all ranks."""
        for each in self.units.values():
            each.gather.forget()

    @property
    def mesh(self) -> tuple[int, int]:
        """Hosts whose shards are reduced among each other (1 without HSDP), and ranks that parameters are cut for."""
        first = next(iter(self.units.values()))
        replicas = 1 if first.between is None else dist.get_world_size(first.between.group)
        return replicas, first.unit.layout.world_size

    @property
    def rank(self) -> int:
        """This rank's number in the mesh, hosts after each other."""
        first = next(iter(self.units.values()))
        row = 0 if first.between is None else dist.get_rank(first.between.group)
        return row * self.mesh[1] + dist.get_rank(first.unit.layout.process_group)

    def state_dict(self) -> dict[str, Any]:
        """This rank's counters, residuals and own part of the references: tensors and plain data. Each rank's differs.

        For torch.distributed.checkpoint see `dcp_state`.
        """
        units = {name: unit_state(each) for name, each in self.units.items()}
        return {"mesh": list(self.mesh), "rank": self.rank, "units": units}

    def dcp_state(self) -> dict[str, Tensor]:
        """This rank's state for torch.distributed.checkpoint: `dcp.save({"model": ..., **handle.dcp_state()})`."""
        return pack_state(self.state_dict(), self.rank)

    def load_dcp(self, path: str | Path) -> None:
        """Restore what `dcp.save` wrote to `path`, on any mesh, after the module's parameters were loaded.

        All ranks call it. To the bit on the same mesh; see `commq.fold`. Raises as `load_state_dict`.
        """
        replicas, world_size = self.mesh
        saved = count_states(path)
        (state,) = read_states(path, [min(self.rank, saved - 1)])
        if state["mesh"] != [replicas, world_size]:
            state = fold_shards(read_states(path, range(saved)), world_size, replicas)[self.rank]
        self.load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit, after the module's parameters were loaded. All ranks call it.

        On another mesh, `commq.fold` the states of all ranks first. Raises ValueError if the state is of another recipe
        or another model.
        """
        found = state["units"]
        if found.keys() != self.units.keys():
            odd = sorted(found.keys() ^ self.units.keys())
            raise ValueError(
                f"the state has other FSDP modules than this model: {odd[:5]}; load the state of a model that is "
                "sharded in the same way"
            )
        for name, each in self.units.items():
            load_unit(each, found[name])
