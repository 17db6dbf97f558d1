"""The precision of a run's linear layers, from its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch._dynamo
from torch import nn

from commq.lowp import Policy, convert, policy
from commq.lowp.control import Control
from commq.lowp.schedule import Schedule, schedule
from commq.recipes import read_mapping
from commq.train.config import Config
from commq.train.model import Block


def make_control(model: nn.Module, config: Config) -> Control | None:
    """Convert the model's linear layers, in place; None if they stay as they are.

    ValueError: an unknown precision or schedule, or one that fits no layer.
    """
    if config.lowp.precision == "none":
        return None
    plan = _plan(config)
    fallback = None if config.lowp.fallback == "none" else read_policy(config.lowp.fallback)
    conversion = convert(model, plan.at(1), seed=config.seed)
    return Control(conversion, plan, fallback=fallback, fallback_steps=config.lowp.fallback_steps)


def check_layers(control: Control, model: nn.Module) -> None:
    """ValueError if the model was taken apart after its layers were converted: they would compute something else."""
    layers = {id(module) for module in model.modules()}
    for name, layer in control.conversion.modules.items():
        if id(layer) not in layers or layer.weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"--precision with a model in parts: layer {name} is shared out or replaced; expected --parallel ddp, "
                "fsdp or hsdp alone"
            )


def describe(config: Config) -> str:
    """Every policy that may hold, and when, as text: what a resumed run must have in common with its checkpoint.

    ValueError or OSError for what cannot be read.
    """
    if config.lowp.precision == "none":
        return "none"
    plan = _plan(config)
    policies = [*plan.policies(), *([read_policy(config.lowp.fallback)] if config.lowp.fallback != "none" else [])]
    return f"{plan}: " + json.dumps([each.plain() for each in policies])


def _plan(config: Config) -> Schedule:
    """The schedule; the phases of a named recipe are its own."""
    text = config.lowp.precision
    return schedule(config.lowp.schedule, read_policy(text) if _is_file(text) else text, config.steps)


def read_policy(text: str) -> Policy:
    """A policy by its name or from a file. ValueError, OSError."""
    return policy(read_mapping(Path(text)) if _is_file(text) else text)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile what a block consists of; the block itself has the hooks of sharding.

    Each precision has graphs of its own, with and without gradients and statistics: more than torch keeps by default,
    after which it would go on without compiling.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.modules():
        if isinstance(block, Block):
            block.attention.compile()
            block.mlp.compile()


def _is_file(text: str) -> bool:
    return Path(text).suffix in (".toml", ".yaml", ".yml")
