"""Residuals of one rank, by parameter name.

A bucket needs its residuals as one flat buffer, but DDP rebuilds its buckets, so a buffer is only a place: the
residual belongs to the parameter. `bind` lays the parameters of a bucket out in one new buffer and moves what is
already known of them into it, bit by bit. Parameters start at whole blocks, so int8 storage moves exactly too.

Skipped steps (GradScaler found an infinity): blocks with a NaN or an infinity keep their residual; the others have
advanced, so at most one residual's worth of the skipped gradient is lost. Residuals are always finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commq.codecs.reference import load_residual
from commq.feedback.rule import Feedback

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Segment:
    """Where one parameter stands in a buffer: elements [offset, offset + numel), offset a multiple of the block."""

    name: str
    offset: int
    numel: int


@dataclass
class Stored:
    """Residual numbers: values (fp32, bf16 or int8 codes) and, for int8, one float32 scale for each block."""

    values: Tensor
    scales: Tensor | None

    def copy_(self, other: Stored) -> None:
        self.values.copy_(other.values)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales)

    def to_float(self, block: int) -> Tensor:
        return load_residual(self.values, self.scales, block)


class Residual:
    """All residuals of a rank, and the buffers they stand in."""

    def __init__(self, feedback: Feedback, block: int) -> None:
        self.feedback = feedback
        self.block = block
        """Elements that share a scale in int8 storage: the block of the format."""
        self.loss_scale = 1.0
        self._by_name: dict[str, Stored] = {}

    def bind(self, segments: list[Segment], numel: int, device: torch.device) -> Stored:
        """One zeroed buffer of `numel` elements on `device` that holds these parameters from now on."""
        scales = None
        if self.feedback.storage == "int8":
            scales = torch.zeros(-(-numel // self.block), device=device)
        buffer = Stored(torch.zeros(numel, dtype=_DTYPES[self.feedback.storage], device=device), scales)
        for segment in segments:
            view = self._view(buffer, segment)
            if segment.name in self._by_name:
                _check_length(segment.name, self._by_name[segment.name].values.numel(), segment.numel)
                view.copy_(self._by_name[segment.name])
            self._by_name[segment.name] = view
        return buffer

    def _view(self, buffer: Stored, segment: Segment) -> Stored:
        first = segment.offset // self.block
        blocks = -(-segment.numel // self.block)
        return Stored(
            buffer.values[segment.offset : segment.offset + segment.numel],
            None if buffer.scales is None else buffer.scales[first : first + blocks],
        )

    def zero_(self) -> None:
        for stored in self._by_name.values():
            stored.values.zero_()
            if stored.scales is not None:
                stored.scales.zero_()

    def set_loss_scale(self, loss_scale: float) -> None:
        """Gradients come multiplied by `loss_scale` from now on: residuals follow.

        Exact for the powers of two that GradScaler uses, short of overflow and underflow.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise ValueError(f"loss_scale={loss_scale}: expected a finite number above 0")
        ratio = loss_scale / self.loss_scale
        if ratio != 1.0:
            for stored in self._by_name.values():
                target = stored.values if stored.scales is None else stored.scales
                top = torch.finfo(target.dtype).max
                target.mul_(ratio).clamp_(-top, top)
        self.loss_scale = loss_scale

    def norm(self) -> float:
        """2-norm of all residuals in the gradients' (scaled) unit. Waits for the device."""
        squares = [s.to_float(self.block).to(torch.float64).square().sum() for s in self._by_name.values()]
        return math.sqrt(sum(float(square) for square in squares))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; this rank's only. `load_state_dict` restores it to the bit."""
        return {
            "rule": self.feedback.rule,
            "storage": self.feedback.storage,
            "block": self.block,
            "loss_scale": self.loss_scale,
            "values": {name: s.values.clone() for name, s in self._by_name.items()},
            "scales": {name: s.scales.clone() for name, s in self._by_name.items() if s.scales is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved residuals, zeros where none were saved; parameters not bound yet get theirs later.

        Raises ValueError, and changes nothing, if the rule, the storage, the block or a parameter's length differs.
        """
        found = state["rule"], state["storage"], state["block"]
        expected = self.feedback.rule, self.feedback.storage, self.block
        if found != expected:
            raise ValueError(
                f"residuals were saved with (rule, storage, block)={found}, this recipe has {expected}; "
                "resume with the recipe they were saved with, or leave the residuals out to start from zero"
            )
        for name in state["values"].keys() & self._by_name.keys():
            _check_length(name, state["values"][name].numel(), self._by_name[name].values.numel())
        self.zero_()
        for name, values in state["values"].items():
            known, scales = self._by_name.get(name), state["scales"].get(name)
            if known is None:
                self._by_name[name] = Stored(values.clone(), None if scales is None else scales.clone())
            else:
                known.copy_(Stored(values, scales))
        self.loss_scale = float(state["loss_scale"])


def _check_length(name: str, saved: int, numel: int) -> None:
    if saved != numel:
        raise ValueError(f"residual of {name!r} has {saved} elements in the checkpoint, the parameter has {numel}")
