"""Convert the linear layers of a model, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from commq.lowp.gemm import GEMMS, Precision
from commq.lowp.linear import Clock, Linear
from commq.lowp.policy import Policy
from commq.lowp.policy import policy as read_policy
from commq.lowp.statistics import Statistic, new_probe, read


@dataclass(frozen=True)
class Row:
    """One linear layer in the table."""

    name: str
    shape: tuple[int, int]
    """Outputs, inputs."""
    precision: Precision
    real: tuple[bool, bool, bool]
    """Which GEMMs are the chip's own; the others are emulated, or as they were."""
    reason: str
    """Why not what the policy's default says; empty if it is that."""


class Conversion:
    """What `convert` made of a model's linear layers."""

    def __init__(self, modules: dict[str, Linear], blocks: tuple[str, ...], policy: Policy, clock: Clock) -> None:
        self.modules = modules
        """Name to layer, of all linear layers, those that stay as they are included."""
        self.blocks = blocks
        """Prefixes of the transformer blocks."""
        self._clock = clock
        self._reasons: dict[str, str] = {}
        self.policy = policy
        self.set_policy(policy)

    def set_policy(self, policy: str | Mapping[str, Any] | Policy) -> None:
        """Switch precisions, between steps: parameters, optimizer state and hooks stay what they are.

        All ranks must do so at the same step. A compiled model is compiled again for precisions it has not seen.
        """
        self.policy = read_policy(policy)
        for name, (precision, reason) in self.policy.choose(list(self.modules), self.blocks).items():
            self.modules[name].set_precision(precision, self.policy.min_features)
            self._reasons[name] = reason

    @property
    def rows(self) -> tuple[Row, ...]:
        """What is done in each layer, on the device where it is now."""
        rows = []
        for name, module in self.modules.items():
            shape = (module.out_features, module.in_features)
            if module.plan is None and not module.precision.is_plain:
                rows.append(Row(name, shape, Precision(), (False,) * 3, "kept: too small to gain"))
                continue
            real = (False, False, False) if module.plan is None else module.plan.real
            rows.append(Row(name, shape, module.precision, real, self._reasons[name]))
        return tuple(rows)

    def step(self, number: int) -> None:
        """Say which pass follows: the counter of its random bits, with the seed, the layer, the rank and the element.

        Call it before each forward pass with a number that none had before, such as step * micro_batches + micro_batch;
        a run that resumes with the same numbers draws the same bits. Without it, all passes draw the same. Activation
        checkpointing repeats a forward pass with the same bits if its backward pass comes before the next call.
        """
        self._clock.step.fill_(number)

    def watch(self, on: bool = True) -> None:
        """Collect statistics of all operands from the next pass on, or stop. It costs one emulated quantization of each
        operand more, and a compiled model is compiled once more.
        """
        for module in self.modules.values():
            module.probe = new_probe(module.weight.device) if on and module.plan is not None else None

    def statistics(self) -> list[Statistic]:
        """What was collected since the last call, of each operand; waits for the device."""
        probes = {name: module.probe for name, module in self.modules.items()}
        return [each for name, probe in probes.items() if probe is not None for each in read(name, probe)]

    def table(self) -> str:
        """Layer, shape, format of each GEMM and whether it is real or emulated, as text in columns."""
        head = ("layer", "shape", *(name.replace("_", " ") for name in GEMMS), "")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in text)

    def __str__(self) -> str:
        return f"policy {self.policy.name}\n{self.table()}"


def convert(model: nn.Module, policy: str | Mapping[str, Any] | Policy, *, seed: int = 0) -> Conversion:
    """Compute the linear layers of `model` as `policy` says: one of recipes(), plain data, or a Policy.

    In place: each nn.Linear (no subclass of it) becomes a commq.lowp.Linear with the same parameters, names and hooks,
    so optimizers, checkpoints, DDP and FSDP2 see no difference. Convert before wrapping or compiling.
    seed: of stochastic rounding and random signs (32 bits); ranks draw different bits from the same seed.
    Raises ValueError for a policy that fits no layer of the model.
    """
    policy = read_policy(policy)
    modules = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Linear)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to convert; convert the model before fully_shard, which changes "
            "the classes of its modules"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected 0 <= seed < 2**32")
    if any(isinstance(module.weight, DTensor) for module in modules.values()):
        raise ValueError("a weight is a DTensor already; convert the model before it is sharded")
    blocks = block_names(model)
    policy.choose(list(modules), blocks)  # raises before anything is changed
    clock = Clock()
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    layers: dict[str, Linear] = {}
    for name, module in modules.items():
        module.__class__ = Linear
        assert isinstance(module, Linear)
        module.clock, module.name, module.seed, module.rank, module.probe = clock, name, seed, rank, None
        layers[name] = module
    return Conversion(layers, blocks, policy, clock)


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the transformer blocks, in order: the children of the ModuleList or Sequential with most parameters
    whose children are of one class and have linear layers of their own.
    """
    best: tuple[int, tuple[str, ...]] = (0, ())
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len({type(child) for child in module}) != 1:
            continue
        if any(isinstance(child, nn.Linear) for child in module):
            continue
        numel = sum(parameter.numel() for parameter in module.parameters())
        names = tuple(f"{name}.{child}" if name else child for child, _ in module.named_children())
        best = max(best, (numel, names))
    return best[1]


def _cells(row: Row) -> tuple[str, ...]:
    gemms = (
        "as it is" if gemm is None else f"{gemm} ({'real' if real else 'emulated'})"
        for gemm, real in zip(row.precision.gemms, row.real, strict=True)
    )
    return (row.name, f"{row.shape[0]}x{row.shape[1]}", *gemms, row.reason)
