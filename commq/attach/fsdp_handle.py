"""Handle: what commq keeps for a sharded module, over all of its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from commq.attach.fsdp_between import BetweenHosts
from commq.attach.fsdp_gather import WeightGather
from commq.attach.fsdp_scatter import GradientScatter
from commq.attach.fsdp_unit import Traffic, Unit
from commq.feedback.residual import Residual


@dataclass(frozen=True)
class Attached:
    """What commq put into one FSDP module."""

    unit: Unit
    gather: WeightGather
    scatter: GradientScatter
    between: BetweenHosts | None

    @property
    def residuals(self) -> dict[str, Residual]:
        found = {"first": self.scatter.residual, "second": self.scatter.second_residual}
        return found | ({"between": self.between.residual} if self.between else {})

    @property
    def traffics(self) -> dict[str, Traffic]:
        found = {"weights": self.unit.weights, "gradients": self.unit.gradients}
        return found | ({"between": self.between.traffic} if self.between else {})


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

    def state_dict(self) -> dict[str, Any]:
        """This rank's counters, residuals and own part of the references: tensors and plain data."""
        return {name: _unit_state(each) for name, each in self.units.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit, after the module's parameters were loaded. All ranks call it.

        At another world size, `commq.fold_shards` the states of all ranks first. Raises ValueError if the state is of
        another recipe or another model.
        """
        if state.keys() != self.units.keys():
            odd = sorted(state.keys() ^ self.units.keys())
            raise ValueError(
                f"the state has other FSDP modules than this model: {odd[:5]}; load the state of a model that is "
                "sharded in the same way"
            )
        for name, each in self.units.items():
            _load_unit(each, state[name])


def _unit_state(each: Attached) -> dict[str, Any]:
    tracker = each.gather.tracker
    own = tracker.own.clone() if tracker is not None and (tracker.known or tracker.has_own) else None
    return {
        "steps": each.unit.steps,
        "progress": each.unit.progress.state_dict(),
        "traffic": {name: [t.raw, t.sent, t.leaving] for name, t in each.traffics.items()},
        "residuals": {name: residual.state_dict() for name, residual in each.residuals.items()},
        "reference": each.gather.saved if own is None else own,
        "shards": [[s.name, s.numel, list(s.valid)] for s in each.unit.layout.shards],
    }


def _load_unit(each: Attached, state: dict[str, Any]) -> None:
    found = [name for name, _, _ in state["shards"]]
    expected = [shard.name for shard in each.unit.layout.shards]
    numels = [numel for _, numel, _ in state["shards"]]
    if found != expected or numels != [shard.numel for shard in each.unit.layout.shards]:
        raise ValueError(
            f"the state is of parameters {found} in shards of {numels}, the module has {expected} in shards of "
            f"{[shard.numel for shard in each.unit.layout.shards]}; commq.fold_shards re-shards a state"
        )
    each.unit.steps = state["steps"]
    each.unit.progress.load_state_dict(state["progress"])
    for name, traffic in each.traffics.items():
        traffic.raw, traffic.sent, traffic.leaving = state["traffic"].get(name, [0, 0, 0])
    for name, residual in each.residuals.items():
        residual.load_state_dict(state["residuals"][name])
    if isinstance(state["reference"], torch.Tensor):
        each.gather.restore(state["reference"])
    else:
        each.gather.forget()
