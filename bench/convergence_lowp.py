"""Low precision in bench/convergence.py: what `--lowp` says, controls that must fail, and the gates.

A text is precision+update+recipe, later parts left out or "-" where they are as in the baseline:

    fp8                        GEMMs in fp8
    -+adamw8bit                moments in 8 bits
    fp8+adamw8bit+int4         both, and gradients that travel in int4
    int8-tensor@64             with a planted outlier channel; so is the run that it is compared with

Layers are never too small here: what is asked for is done, emulated where the chip has no such GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from commq.lowp import Policy, convert, policy, recipes
from commq.lowp.control import Control
from commq.lowp.schedule import Schedule, Stage, schedule
from commq.train.config import LOW_BIT
from commq.train.model import Block

BASE_UPDATE = dict.fromkeys((*LOW_BIT, "adamw4bit-zero"), "adamw")
"""What an update is compared with, if not with itself uncompressed."""
CONTROLS = {
    "int8-tensor": dict.fromkeys(("forward", "input_gradient", "weight_gradient"), "int8/tensor"),
    "int4-tensor": dict.fromkeys(("forward", "input_gradient", "weight_gradient"), "int4/tensor"),
}
"""Precisions that must fail: one scale for a whole tensor, rounded to nearest."""
OUTLIER_CHANNEL = 7
BOUNDS = {
    **dict.fromkeys(
        ("fp8", "fp8-rowwise", "fp8-block", "int8", "int8-block", "int8-fallback", "switchback", "mxfp8"), 0.25
    ),
    **dict.fromkeys(("mxfp4", "nvfp4", "int4"), 1.5),
    "fp4-tpt": 0.5,
}
"""Largest gap, in percent, of GEMMs alone."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a text says."""

    precision: str = "none"
    update: str = "adamw"
    recipe: str = "fp32"
    outlier: float = 0.0


def read_choice(text: str) -> Choice:
    """ValueError for a precision or an update that there is not; recipes are not looked at."""
    parts = [*(part or "-" for part in text.split("+", 2)), "-", "-"][:3]
    name, _, outlier = parts[0].partition("@")
    if name not in ("-", "none", *recipes(), *CONTROLS):
        raise ValueError(f"{text!r}: precision {name!r}, expected -, {', '.join((*recipes(), *CONTROLS))}")
    if parts[1] not in ("-", "adamw", *BASE_UPDATE):
        raise ValueError(f"{text!r}: update {parts[1]!r}, expected -, adamw, {', '.join(BASE_UPDATE)}")
    defaults = Choice()
    return Choice(
        precision=defaults.precision if name == "-" else name,
        update=defaults.update if parts[1] == "-" else parts[1],
        recipe=defaults.recipe if parts[2] == "-" else parts[2],
        outlier=float(outlier or 0.0),
    )


def label_of(row: dict[str, Any]) -> str:
    """The text of a row, with at least one +; its recipe's name where nothing but gradients is compressed."""
    precision, update, recipe = row.get("precision", "none"), row["update"], row["recipe"]
    outlier = f"@{row['outlier']:g}" if row.get("outlier") else ""
    if precision == "none" and update not in BASE_UPDATE and not outlier:
        return recipe
    parts = [("-" if precision == "none" else precision) + outlier, update if update in BASE_UPDATE else "-", recipe]
    return "+".join(parts[:2] if recipe == "fp32" else parts)


def make_control(model: nn.Module, name: str, seed: int, steps: int) -> Control | None:
    """Convert the model; a recipe with phases changes as the run goes on."""
    if name == "none":
        return None
    if name in CONTROLS:
        plan = Schedule(steps=steps, stages=(Stage(after=0, policy=_all(policy({"default": CONTROLS[name]}))),))
    else:
        named = schedule("", name, steps)
        plan = replace(named, stages=tuple(replace(stage, policy=_all(stage.policy)) for stage in named.stages))
    return Control(convert(model, plan.at(1), seed=seed), plan)


def plant_outlier(model: nn.Module, gain: float) -> None:
    """Make one channel of every normalised input `gain` times as large, and its weights as much smaller.

    The model computes what it did.
    """
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, Block):
                for norm, linear in ((block.attention_norm, block.attention.qkv), (block.mlp_norm, block.mlp[0])):
                    norm.weight[OUTLIER_CHANNEL] *= gain
                    linear.weight[:, OUTLIER_CHANNEL] /= gain


def _all(what: Policy) -> Policy:
    """Also layers that are too small to gain."""
    return replace(what, min_features=0)


def emulation_work(precision: str) -> int:
    """Runs with more start earlier: what is emulated on an H100 multiplies in float32; int8-fallback finds its outliers
    in plain torch."""
    emulated = ("mxfp8", "mxfp4", "nvfp4", "int4", "fp4-tpt", "int4-tensor")
    return 8 if precision in (*emulated, "int8-fallback") else 6
