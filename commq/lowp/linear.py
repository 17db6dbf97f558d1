"""Linear layers with three GEMMs in low precision.

The layer keeps parameters, names and hooks of the nn.Linear it was: `convert` changes its class. Parameters are read
when the layer runs, as FSDP2 needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commq.lowp.gemm import Precision
from commq.lowp.product import Plan, Product

MEASURED = dict.fromkeys(("fp8_e4m3/tensor", "fp8_e5m2/tensor", "fp8_e4m3/row", "fp8_e4m3/1x128", "int8/row"), 4096)
"""Fewest inputs and outputs from which a real GEMM gains, by format and tile of its first operand.

On an H100, with 16384 tokens and layers that are not compiled (bench/gemm.py --parts filter), they take 1.2 to 1.6
times as long as bf16 at 2048 features and 0.77 to 0.94 times at 4096, quantization included.
"""


class Clock:
    """The number of the pass that runs, shared by all layers: one int64 on their device."""

    def __init__(self) -> None:
        self.step = torch.zeros((), dtype=torch.int64)

    def move(self, device: torch.device) -> None:
        if device.type != "meta" and self.step.device != device:
            self.step = self.step.to(device)


class Linear(nn.Linear):
    """nn.Linear whose GEMMs are computed as its plan says; made by `convert`."""

    clock: Clock
    name: str
    """In the model: it names the layer's random bits."""
    seed: int
    rank: int
    precision: Precision
    """What the policy says; `plan` is what is done."""
    min_features: int | None
    plan: Plan | None
    """None: as nn.Linear does."""
    probe: Tensor | None
    """Collects statistics while the layer is watched."""

    def set_precision(self, precision: Precision, min_features: int | None) -> None:
        """Compute as `precision` says from now on, unless the layer has fewer features than were measured to gain."""
        self.precision, self.min_features = precision, min_features
        self.place()

    def place(self) -> None:
        """Decide what is real on the device where the weight is."""
        device = self.weight.device
        self.clock.move(device)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        features = self.out_features, self.in_features
        plan = Plan.of(self.precision, features, capability, name=self.name, seed=self.seed, rank=self.rank)
        small = min(features) < self._fewest(plan)
        self.plan = None if small or self.precision.is_plain else plan

    def _fewest(self, plan: Plan) -> int:
        if self.min_features is not None:
            return self.min_features
        kinds = (gemm.first.kind for gemm, real in zip(self.precision.gemms, plan.real, strict=True) if gemm and real)
        return max((MEASURED.get(kind, 0) for kind in kinds), default=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.plan is None:
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y = Product.apply(x.reshape(-1, self.in_features), self.weight, self.clock.step, self.plan, self.probe)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.precision}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """.to(), .cuda() and the like: another device may have other GEMMs."""
        applied = super()._apply(fn, recurse)
        self.place()
        return applied
