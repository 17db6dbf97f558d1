"""What a group remembers between exchanges: its buffers and its side stream. It goes when the group goes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

KEPT = 24
"""Free buffers kept on the CPU: those of a few pieces under way, of a few lengths."""

NOTES = 4096


class Memory:
    """Buffers for bytes on their way, and facts that the ranks of a group found out once and agree on.

    On the CPU, free buffers are kept: fresh memory costs a page fault for every 4 KiB. On CUDA torch's allocator
    keeps them, per stream.
    """

    def __init__(self) -> None:
        self.facts: dict[Hashable, Any] = {}
        self.notes: dict[Hashable, Any] = {}
        """What this rank can find again without the others."""
        self.sent_bytes = 0
        """Bytes that this rank's moves have sent to others since the group was made."""
        self._free: list[tuple[tuple[int, int], int, Tensor]] = []
        """Shape, bytes of the whole buffer, and the tensor that was given back."""
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def note(self, key: Hashable, value: Any) -> None:
        """Write to `notes`. They are all forgotten when there are too many: lengths of messages may never repeat."""
        if len(self.notes) >= NOTES:
            self.notes.clear()
        self.notes[key] = value

    def take(self, rows: int, nbytes: int, device: torch.device) -> Tensor:
        """uint8 (rows, nbytes), contiguous, with arbitrary contents. Give it back after the exchange."""
        if device.type == "cpu" and self._free:
            for i, (shape, _, buffer) in enumerate(self._free):
                if shape == (rows, nbytes):
                    del self._free[i]
                    return buffer
            need = rows * nbytes
            for i, (_, whole, buffer) in enumerate(self._free):
                if need <= whole <= need + need // 4 + 4096:
                    del self._free[i]
                    return torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())[:need].view(rows, nbytes)
        return torch.empty((rows, nbytes), dtype=torch.uint8, device=device)

    def give(self, *buffers: Tensor) -> None:
        """Take buffers back: nothing may read or write them any more."""
        for buffer in buffers:
            if buffer.device.type == "cpu" and buffer.numel():
                self._free.append((_shape(buffer), buffer.untyped_storage().nbytes(), buffer))
        if len(self._free) > KEPT:
            del self._free[: len(self._free) - KEPT]

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that asynchronous exchanges of this group run on."""
        if device not in self._side:
            self._side[device] = torch.cuda.Stream(device)
        return self._side[device]


def _shape(buffer: Tensor) -> tuple[int, int]:
    """What it can be handed out again as, the tensor itself; (0, 0): only its storage can."""
    if buffer.dim() != 2 or not buffer.is_contiguous() or buffer.storage_offset() or buffer.is_inference():
        return 0, 0
    rows, nbytes = buffer.shape
    return rows, nbytes


_memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()


def known_memory(group: object) -> Memory | None:
    """The memory of a process group or communicator that has one; nothing is made."""
    return None if group is None else _memories.get(group)


def memory_of(group: object) -> Memory:
    """The memory of a process group or communicator."""
    memory = _memories.get(group)
    if memory is None:
        memory = _memories[group] = Memory()
    return memory
