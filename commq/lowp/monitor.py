"""What quantization does to the operands of each layer: SQNR, underflow and overflow, measured in a pass now and then.

Inside `watching()` each converted layer quantizes its input, weight and output gradient once more and compares; outside
nothing runs. Cost: one quantization of each operand and three sums, in watched passes only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commq.codecs.rotation import rotate
from commq.lowp.convert import Conversion
from commq.lowp.gemm import Gemm
from commq.lowp.linear import Linear
from commq.lowp.operand import Operand
from commq.lowp.quantize import Counter, quantized


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One operand of one layer."""

    layer: str
    operand: str
    """input, weight or gradient (of the output)."""
    format: str
    sqnr: float
    """Energy of the operand over that of what quantization changed, in dB; inf if it changed nothing."""
    underflow: float
    """Share of the numbers that are not zero and become zero."""
    overflow: float
    """Share of the numbers that are not finite: what overflowed before, or does here."""


class Monitor:
    """Reads a conversion's layers. `readings` has the last watched pass, and waits for the device."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self._found: dict[tuple[str, str], tuple[str, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Passes inside are measured; of several, the last."""
        self._found = {}
        handles = [
            module.register_forward_hook(functools.partial(self._watch, name))
            for name, module in self.conversion.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def readings(self) -> list[Reading]:
        """Of all layers that are in low precision, in the order in which they ran."""
        if not self._found:
            return []
        rows = torch.stack([sums for _, sums in self._found.values()]).cpu().tolist()
        found = []
        for (layer, operand), (name, _), row in zip(self._found, self._found.values(), rows, strict=True):
            signal, lost, nonzero, vanished, bad, count = row
            sqnr = math.inf if lost == 0.0 else 10.0 * math.log10(signal / lost) if signal > 0.0 else -math.inf
            found.append(
                Reading(
                    layer=layer,
                    operand=operand,
                    format=name,
                    sqnr=sqnr,
                    underflow=vanished / max(1.0, nonzero),
                    overflow=bad / max(1.0, count),
                )
            )
        return found

    def _watch(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, Linear)
        forward, backward = module.precision.forward, module.precision.input_gradient
        if forward is not None:
            self._read(name, "input", inputs[0], forward, forward.first)
            self._read(name, "weight", module.weight, forward, forward.second)
        if backward is not None and output.requires_grad:
            output.register_hook(lambda dy: self._read(name, "gradient", dy, backward, backward.first))

    @torch.no_grad()
    def _read(self, name: str, which: str, x: Tensor, gemm: Gemm, operand: Operand) -> None:
        x_RC = x.detach().reshape(-1, x.shape[-1]).float()
        if gemm.rotation is not None:
            size = gemm.rotation.size
            x_RC = F.pad(x_RC, (0, -x_RC.shape[1] % size)).contiguous()
            x_RC = rotate(x_RC.view(-1), gemm.rotation, None).view(x_RC.shape)
        zero = torch.zeros((), dtype=torch.int64, device=x.device)
        y_RC = quantized(x_RC, operand, Counter(0, 0, zero)).float()
        good = x_RC.isfinite() & y_RC.isfinite()
        x_RC, y_RC = torch.where(good, x_RC, 0.0), torch.where(good, y_RC, 0.0)
        nonzero = x_RC != 0
        sums = (
            x_RC.double().square().sum(),
            (x_RC.double() - y_RC.double()).square().sum(),
            nonzero.sum(),
            (nonzero & (y_RC == 0)).sum(),
            (~good).sum(),
            torch.full((), x_RC.numel(), device=x.device),
        )
        self._found[(name, which)] = str(operand), torch.stack([each.double() for each in sums])
