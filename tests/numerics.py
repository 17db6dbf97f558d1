"""Inputs that codecs get wrong, fewer combinations of them, and what fp32 sums may lose."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def nasty_inputs() -> dict[str, Tensor]:
    """Named float32 vectors, finite but for those named inf and nan, and the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(length: int) -> Tensor:
        return torch.randn(length, generator=generator)

    largest = torch.finfo(torch.float32).max
    smallest = torch.finfo(torch.float32).smallest_normal
    inputs = {f"length {length}": normal(length) for length in (1, 127, 128, 129, 1000)}
    inputs["zeros"] = torch.zeros(1000)
    inputs["one value"] = torch.full((1000,), 0.1)
    inputs["negative"] = -normal(1000).abs() - 0.01
    inputs["one huge value"] = normal(1000).index_fill(0, torch.tensor([345]), largest)
    inputs["subnormals"] = normal(1000).clamp(-3, 3) * (smallest / 4)
    inputs["one subnormal"] = torch.zeros(1000).index_fill(0, torch.tensor([345]), 2.0**-149)
    inputs["regions"] = normal(1000) * torch.logspace(-3, 3, 10).repeat_interleave(100)
    chi_squared = normal(1000) ** 2 + normal(1000) ** 2
    inputs["heavy tail"] = normal(1000) / (chi_squared / 2).sqrt()  # Student's t, 2 degrees of freedom
    inf, nan = torch.inf, torch.nan
    for name, values in {"inf": [inf, -inf], "nan": [nan], "inf nan": [inf, nan]}.items():
        inputs[name] = normal(1000)
        inputs[name][300 : 300 + len(values)] = torch.tensor(values)
    return inputs


def mean_rounding(inputs_WN: Tensor) -> Tensor:
    """How far fp32 means of W rows may be off, in any order: half an eps for each addition and for the division."""
    world_size = len(inputs_WN)
    return (world_size + 1) * torch.finfo(torch.float32).eps / 2 * inputs_WN.to(torch.float64).abs().mean(dim=0)


def paired(names: Iterable[str], others: Sequence[Any], turn: int) -> list[tuple[str, Any]]:
    """Each name with one of the others. Over as many turns in a row as there are others, every pair comes once."""
    return [(name, others[(i + turn) % len(others)]) for i, name in enumerate(names)]
