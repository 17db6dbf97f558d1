"""The stages of a GPT in one process, with both sides of every boundary between them.

What crosses goes through the library's own crossings, so that a run with one process a stage gives the same bits
(tests/test_pipeline_loss.py holds that).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from commq.attach.crossing import Crossing, Place, Samples, Turn, Way
from commq.collectives.arguments import flat
from commq.collectives.memory import Memory
from commq.train.model import GPT, next_byte_loss
from commq.train.pipelined import GPTStage


class Boundary:
    """Both sides of the boundary after stage `number`, both directions. On CUDA tensors cross as bfloat16."""

    def __init__(self, number: int, ways: tuple[Way, Way], seed: int) -> None:
        self._number, self._ways, self._seed = number, ways, seed
        self._sides: dict[bool, tuple[Crossing, Crossing]] = {}
        self.sent_bytes = 0

    def cross(self, x: Tensor, turn: Turn, *, backward: bool) -> Tensor:
        """What arrives at the other side."""
        if backward not in self._sides:
            self._sides[backward] = self._side(x, backward, True), self._side(x, backward, False)
        sender, receiver = self._sides[backward]
        wire = torch.empty(sender.nbytes(turn), dtype=torch.uint8, device=x.device)
        self.sent_bytes += wire.numel()
        sender.encode(flat(x), wire, turn)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        receiver.decode(wire, y.view(-1), turn)
        return y

    def _side(self, like: Tensor, backward: bool, sends: bool) -> Crossing:
        place = Place(self._number, backward, sends, 0, self._seed, Memory(), "auto")
        return self._ways[backward].crossing(place, like)


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: Boundary, turn: Turn) -> Tensor:
        ctx.boundary, ctx.turn = boundary, turn
        return boundary.cross(x, turn, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.boundary.cross(gradients[0], ctx.turn, backward=True), None, None


class Chain:
    """A GPT as `count` stages, trained in micro-batches as torch's GPipe schedule does."""

    def __init__(self, gpt: GPT, count: int, ways: tuple[Way, Way], *, seed: int = 0) -> None:
        self.stages = nn.ModuleList(GPTStage(gpt, index, count) for index in range(count))
        self.boundaries = [Boundary(number, ways, seed) for number in range(count - 1)]
        self._steps = 0

    def backward(self, tokens_BT: Tensor, micro_batches: int, ids: Tensor | None) -> Tensor:
        """Leave the gradients of the mean loss in .grad. tokens: T = context + 1; ids: of the rows, on the host."""
        self._steps += 1
        samples = None if ids is None else Samples(ids, ids.to(tokens_BT.device))
        losses = [
            self._loss(tokens, Turn(self._steps, chunk, samples))
            for chunk, tokens in enumerate(tokens_BT.tensor_split(micro_batches))
        ]
        for loss in losses:
            loss.backward()
        for parameter in self.stages.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(micro_batches)
        return torch.stack([loss.detach() for loss in losses]).mean()

    @property
    def sent_bytes(self) -> int:
        return sum(boundary.sent_bytes for boundary in self.boundaries)

    def _loss(self, tokens_BT: Tensor, turn: Turn) -> Tensor:
        x = self.stages[0](tokens_BT[:, :-1])
        for boundary, stage in zip(self.boundaries, self.stages[1:], strict=True):
            x = stage(_Cross.apply(x, boundary, turn))
        return next_byte_loss(x, tokens_BT[:, 1:])
