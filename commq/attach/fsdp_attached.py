"""What commq put into one FSDP module."""

from __future__ import annotations

from dataclasses import dataclass

from commq.attach.fsdp_between import BetweenHosts
from commq.attach.fsdp_gather import WeightGather
from commq.attach.fsdp_scatter import GradientScatter
from commq.attach.fsdp_unit import Traffic, Unit
from commq.feedback.residual import Residual


@dataclass(frozen=True)
class Attached:
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
