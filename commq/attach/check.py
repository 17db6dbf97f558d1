"""Check: whether all replicas of the parameters still have the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from commq.collectives.transport import Transport

_MIX = 0x9E3779B97F4A7C15 - 2**64
_LIMIT = 1 << 22
"""Elements hashed at a time: the hash takes 24 bytes for each of them meanwhile."""


class ReplicaError(RuntimeError):
    """Parameters differ between ranks. `name`: the first that does; `ranks`: those that differ from most others."""

    def __init__(self, message: str, name: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.name = name
        self.ranks = ranks


def bit_hash(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device that any changed bit changes, and any swap of elements up to 32 bits long.

    Sum, modulo 2**64, of (2 i + 1) times an odd number times the bits of element i, so it is exact, and does not
    depend on the order of summation. Waits for nothing.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    flat = tensor.detach().contiguous().view(-1)
    bits_N = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits_N.numel(), _LIMIT):
        piece_M = bits_N[start : start + _LIMIT].to(torch.int64)
        weights_M = (2 * torch.arange(start, start + piece_M.numel(), device=tensor.device) + 1) * _MIX
        total += (piece_M * weights_M).sum()
    return total


def check_replicas(parameters: Mapping[str, Tensor], transport: Transport, step: int) -> None:
    """Raise the same ReplicaError on every rank if a parameter's bits differ. All ranks call it; it blocks."""
    if not parameters:
        return
    hashes = torch.stack([bit_hash(p).cpu() for p in parameters.values()]).tolist()
    rows: list[list[int]] = transport.share(hashes)
    for name, column in zip(parameters, zip(*rows, strict=True), strict=True):
        if len(set(column)) == 1:
            continue
        most = max(column, key=lambda each: (column.count(each), -column.index(each)))
        ranks = tuple(rank for rank, each in enumerate(column) if each != most)
        differing = sum(len(set(other)) > 1 for other in zip(*rows, strict=True))
        raise ReplicaError(
            f"after step {step}, parameter {name!r} differs on rank {', '.join(map(str, ranks))} from the other ranks "
            f"({differing} of {len(parameters)} parameters differ); were parameters changed on some ranks only, or is "
            "an optimizer not deterministic? Load the last checkpoint on all ranks",
            name,
            ranks,
        )
