"""Rehearsals: a schedule run over a transport that moves nothing, to time everything else that it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from commq.collectives.link import SIZES, Curve, rising
from commq.collectives.transport import Transport


class Rehearsal:
    """A transport whose moves are over at once; what arrives is arbitrary bytes, which decode like any others."""

    def __init__(self, transport: Transport) -> None:
        self.rank, self.world_size, self.memory = transport.rank, transport.world_size, transport.memory

    def wait(self) -> None:
        """As a move."""

    def share(self, value: object) -> list[object]:
        return [value] * self.world_size

    def _move(self, *_: object, **__: object) -> Rehearsal:
        return self

    all_to_all = all_to_all_v = all_gather = all_reduce = broadcast = send = recv = _move


def rehearse(time_of: Callable[[Tensor], int], longest: int, dtype: torch.dtype, device: torch.device) -> Curve:
    """The curve of `time_of`, nanoseconds that all ranks agree on, over random tensors of up to `longest` bytes."""
    generator = torch.Generator(device).manual_seed(0)
    points = []
    for nbytes in [*(size for size in SIZES if size < longest), longest]:
        x_N = torch.randn(nbytes // dtype.itemsize, generator=generator, device=device).to(dtype)
        points.append((nbytes, time_of(x_N)))
    return rising(points)
