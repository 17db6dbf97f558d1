"""Residuals of the second hop: what the owners of chunks lost when they encoded their answers.

Every element has one owner, so over all ranks they are as long as the model once, and not once for each rank. Owners
change when DDP rebuilds its buckets: then all ranks put their parts together, by parameter, and take new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commq.collectives.plan import Plan
from commq.collectives.transport import Transport
from commq.feedback.residual import Segment


@dataclass(frozen=True)
class _Run:
    """Elements [start, start + numel) of a parameter, which one rank owns, and their place in its buffer."""

    name: str
    start: int
    at: int
    numel: int


@dataclass(frozen=True)
class _Bound:
    buffer: Tensor
    """float32: this rank's chunk of each piece, as `Operand.answer_residual`."""
    runs: tuple[tuple[_Run, ...], ...]
    """Of every rank."""


class AnswerResidual:
    """What this rank lost as an owner. Classic feedback: it is added to the next answer. Rotated, if gradients are."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.loss_scale = 1.0
        self._bound: list[_Bound] = []
        self._whole: dict[str, Tensor] = {}
        """Whole parameters' residuals, on all ranks, from when buffers were taken apart until others are bound."""

    def bind(
        self, plans: Sequence[Plan], source: int, segments: Sequence[Segment], unit: int, device: torch.device
    ) -> Tensor:
        """A buffer for one source of a message whose parameters stand at `segments`, multiples of `unit`."""
        runs = tuple(tuple(_runs(plans, source, segments, unit, rank)) for rank in range(self.transport.world_size))
        numel = sum(part.answer.chunk_numel for plan in plans for part in plan.parts if part.source == source)
        bound = _Bound(torch.zeros(numel, device=device), runs)
        self._bound.append(bound)
        self._fill(bound)
        return bound.buffer

    def collect(self) -> None:
        """Put all ranks' parts together and forget the buffers. All ranks call it together."""
        transport = self.transport
        for bound in self._bound:
            own = bound.buffer.view(torch.uint8)  # on its device: NCCL moves nothing else
            rows = torch.empty(transport.world_size, own.numel(), dtype=torch.uint8, device=own.device)
            transport.all_gather(own, rows).wait()
            for row, runs in zip(rows.cpu().view(torch.float32), bound.runs, strict=True):
                for run in runs:
                    self._put(run.name, run.start, row[run.at : run.at + run.numel])
        self._bound.clear()

    def settle(self) -> None:
        """A step is over: what was collected is no longer needed where it is bound, which first buckets may not be."""
        if self._whole:
            for run in (run for bound in self._bound for runs in bound.runs for run in runs):
                self._whole.pop(run.name, None)

    def set_loss_scale(self, loss_scale: float) -> None:
        """Gradients come multiplied by `loss_scale` from now on: residuals follow."""
        ratio, top = loss_scale / self.loss_scale, torch.finfo(torch.float32).max
        if ratio != 1.0:
            for tensor in (*(bound.buffer for bound in self._bound), *self._whole.values()):
                tensor.mul_(ratio).clamp_(-top, top)
        self.loss_scale = loss_scale

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data: this rank's runs of each parameter, [start, float32 values]."""
        runs: dict[str, list[list[Any]]] = {name: [[0, whole.clone()]] for name, whole in self._whole.items()}
        for bound in self._bound:
            for run in bound.runs[self.transport.rank]:
                values = bound.buffer[run.at : run.at + run.numel].to("cpu", copy=True)
                runs.setdefault(run.name, []).append([run.start, values])
        return {"loss_scale": self.loss_scale, "runs": runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved residuals; buffers are to be bound anew. All ranks call it together: owners may be others."""
        self._bound.clear()
        self._whole.clear()
        for theirs in self.transport.share(state["runs"]):
            for name, runs in theirs.items():
                for start, values in runs:
                    self._put(name, start, values)
        self.loss_scale = float(state["loss_scale"])

    def _put(self, name: str, start: int, values: Tensor) -> None:
        whole = self._whole.get(name, torch.zeros(0))
        if whole.numel() < start + values.numel():
            whole = torch.nn.functional.pad(whole, (0, start + values.numel() - whole.numel()))
            self._whole[name] = whole
        whole[start : start + values.numel()] = values

    def _fill(self, bound: _Bound) -> None:
        for run in bound.runs[self.transport.rank]:
            known = self._whole.get(run.name, torch.zeros(0))[run.start : run.start + run.numel]
            bound.buffer[run.at : run.at + known.numel()] = known.to(bound.buffer.device)


def _runs(plans: Sequence[Plan], source: int, segments: Sequence[Segment], unit: int, rank: int) -> Iterator[_Run]:
    """What `rank` owns of each parameter, padding to whole units included: a rotation puts something there."""
    at = 0
    for part in (part for plan in plans for part in plan.parts if part.source == source):
        first = part.start + rank * part.answer.chunk_numel
        end = first + part.answer.valid(rank)
        for s in segments:
            lower, upper = max(first, s.offset), min(end, s.offset + -(-s.numel // unit) * unit)
            if lower < upper:
                yield _Run(s.name, lower - s.offset, at + lower - first, upper - lower)
        at += part.answer.chunk_numel
