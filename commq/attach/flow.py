"""Flow: one direction at one side of a boundary: its crossings, its wires, and what is under way.

With a channel, wires travel on it: a send begins as soon as it is encoded, receives are posted ahead, and the schedule
gets no operations. Without one, the schedule's own operations carry the wires in place of the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commq.attach.channel import Channel
from commq.attach.crossing import Crossing, Place, Samples, Turn, Way
from commq.collectives.arguments import copy_back, flat, landing
from commq.collectives.plan import RAW


@dataclass
class _Arrival:
    """A micro-batch that is to be received."""

    turn: Turn
    coded: list[tuple[int, Tensor]] = field(default_factory=list)
    """Number and tensor of those that travel encoded."""
    works: list[dist.Work] = field(default_factory=list)


class Flow:
    """The crossings of a boundary's tensors, made when the first comes, and the wires of micro-batches under way."""

    def __init__(self, way: Way, place: Place) -> None:
        self._way, self._place = way, place
        self.channel: Channel | None = None
        self._crossings: dict[int, Crossing] = {}
        self._saved: dict[int, dict[str, Any]] = {}
        self._wires: dict[tuple[int, int], Tensor] = {}
        self._arrivals: dict[int, _Arrival] = {}
        self._leaving: dict[tuple[int, int], tuple[Tensor, dist.Work]] = {}
        self.raw_bytes = 0
        """Of the tensors that crossed, as float32."""
        self.wire_bytes = 0
        """That crossed in their place."""

    def send(self, operations: list[dist.P2POp], turn: Turn) -> list[dist.P2POp]:
        """Encode what they would send; what is left for the schedule to send."""
        for index, operation in enumerate(operations):
            x, key = operation.tensor.detach(), (turn.chunk, index)
            if key in self._leaving:
                self._leaving.pop(key)[1].wait()  # of the last step: its wire is free
            if x.dtype in RAW:
                crossing = self._crossing(index, x)
                operation.tensor = self._wire(crossing, index, x, turn)
                crossing.encode(flat(x), operation.tensor, turn)
            if self.channel is not None:
                buffer = operation.tensor.contiguous()
                self._leaving[key] = buffer, self.channel.send(buffer)
        return operations if self.channel is None else []

    def flush(self) -> None:
        """Wait until everything has left."""
        for _, work in self._leaving.values():
            work.wait()
        self._leaving.clear()

    def is_posted(self, chunk: int) -> bool:
        return chunk in self._arrivals

    def post(self, operations: list[dist.P2POp], turn: Turn) -> list[dist.P2POp]:
        """Get ready to receive what was encoded; what is left for the schedule to receive. `land` decodes it."""
        if not operations:
            return []
        arrival = self._arrivals[turn.chunk] = _Arrival(turn)
        for index, operation in enumerate(operations):
            y = operation.tensor.detach()
            if y.dtype in RAW:
                operation.tensor = self._wire(self._crossing(index, y), index, y, turn)
                arrival.coded.append((index, y))
            if self.channel is not None:
                arrival.works.append(self.channel.receive(operation.tensor))
        return operations if self.channel is None else []

    def land(self, chunk: int) -> None:
        """Decode what has arrived of a micro-batch; nothing, where stages share a rank."""
        if chunk not in self._arrivals:
            return
        arrival = self._arrivals.pop(chunk)
        for work in arrival.works:
            work.wait()
        for index, y in arrival.coded:
            y_N = landing(y)
            self._crossings[index].decode(self._wires[chunk, index], y_N, arrival.turn)
            copy_back([y], [y_N])()

    def prefetch(self, samples: Samples) -> None:
        for crossing in self._crossings.values():
            crossing.prefetch(samples)

    def state_dict(self) -> dict[str, Any]:
        kept = self._saved | {index: crossing.state_dict() for index, crossing in self._crossings.items()}
        return {"raw_bytes": self.raw_bytes, "wire_bytes": self.wire_bytes, "crossings": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raw_bytes, self.wire_bytes = state["raw_bytes"], state["wire_bytes"]
        self._saved = dict(state["crossings"])
        for index, crossing in self._crossings.items():
            crossing.load_state_dict(self._saved.pop(index))

    def _crossing(self, index: int, like: Tensor) -> Crossing:
        if index not in self._crossings:
            self._crossings[index] = self._way.crossing(replace(self._place, index=index), like)
            if index in self._saved:
                self._crossings[index].load_state_dict(self._saved.pop(index))
        return self._crossings[index]

    def _wire(self, crossing: Crossing, index: int, like: Tensor, turn: Turn) -> Tensor:
        """The buffer of this micro-batch: that of the last step, which is over, if it is as long."""
        nbytes, key = crossing.nbytes(turn), (turn.chunk, index)
        if key not in self._wires or self._wires[key].numel() != nbytes:
            self._wires[key] = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        self.raw_bytes += 4 * like.numel()
        self.wire_bytes += nbytes
        return self._wires[key]
