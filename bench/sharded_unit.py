"""One FSDP module of bench/sharded_replicas.py, on all ranks: masters, gradients, and commq's ends of its collectives.

S ranks share out the module's parameters, R elements a row; W = S times the hosts with HSDP, else W = S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import commq
from commq.attach.fsdp_attached import Attached
from commq.attach.fsdp_between import BetweenHosts
from commq.attach.fsdp_gather import WeightGather
from commq.attach.fsdp_layout import Shard, cut_shard
from commq.attach.fsdp_scatter import GradientScatter
from commq.attach.fsdp_unit import Unit
from thread_ranks import ThreadTransport


@dataclass
class Rows:
    """What commq asks FSDP2 for. A transport stands for the group of its ranks."""

    shards: tuple[Shard, ...]
    process_group: Any
    dtypes: set[torch.dtype]
    divide_factor: None = None
    all_reduces: bool = True

    @property
    def world_size(self) -> int:
        return self.process_group.world_size

    def reduced(self, row_numel: int) -> tuple[int, ...]:
        """All parameters have gradients."""
        return tuple(range(len(self.shards)))


class ShardedUnit:
    """inner: each rank's transport among those that share parameters out; outer: between hosts, with HSDP."""

    def __init__(
        self,
        number: int,
        named: Sequence[tuple[str, nn.Parameter]],
        recipe: commq.Recipe,
        inner: Sequence[ThreadTransport],
        outer: Sequence[ThreadTransport] | None,
        dtype: torch.dtype,
    ) -> None:
        """Parameters are turned into `dtype`, after the masters were taken."""
        self.parameters = [parameter for _, parameter in named]
        self.sharers, self.dtype, self.device = inner[0].world_size, dtype, self.parameters[0].device
        self.shards = tuple(cut_shard(name, tuple(p.shape), 0, self.sharers) for name, p in named)
        row_numel = sum(shard.numel for shard in self.shards)
        self._masters_SR = torch.zeros(self.sharers, row_numel, device=self.device)
        self._gradients_WSR = torch.zeros(len(inner), self.sharers, row_numel, device=self.device)
        self._reduced_WR = torch.zeros(len(inner), row_numel, device=self.device)
        self.sources = [list(self._places(rows_SR)) for rows_SR in self._gradients_WSR]
        """By rank and parameter: where its gradient is sent from, in pieces."""
        for parameter, pieces in zip(self.parameters, self._places(self._masters_SR), strict=True):
            _copy(pieces, _pieces(parameter.data, pieces))
            parameter.data = parameter.data.to(dtype)
        self.masters = dict(self._cut_masters())
        """By the parameter's name: what each of S ranks has of it, with the gradient of its last reduction."""
        self.ends = [
            _attach(Rows(self.shards, transport, {dtype}), recipe, number, outer and outer[rank])
            for rank, transport in enumerate(inner)
        ]
        self._gathered = [(0, 0, 0)] * len(inner)

    def gather(self, rank: int) -> None:
        """Called on all ranks, each in its thread: the model's parameters become what the ranks decode."""
        end = self.ends[rank]
        before = astuple(end.unit.weights)
        transport = end.unit.layout.process_group
        out = end.gather.allocate((self._masters_SR.numel(),), dtype=self.dtype, device=self.device)
        own = out.view(self.sharers, -1)[transport.rank]
        own.copy_(self._masters_SR[transport.rank])
        end.gather(out, own, transport)
        if rank == 0:
            for parameter, pieces in zip(self.parameters, self._places(out.view(self.sharers, -1)), strict=True):
                _copy(_pieces(parameter.data, pieces), pieces)
        self._gathered[rank] = tuple(b - a for a, b in zip(before, astuple(end.unit.weights), strict=True))

    def count_again(self, rank: int, ranks_per_host: int = 0) -> None:
        """Count the backward pass's gather: like the last one, or inside a host, from secondary shards."""
        traffic = self.ends[rank].unit.weights
        if ranks_per_host:
            numel = (ranks_per_host - 1) * self._masters_SR.numel() // ranks_per_host
            traffic.add(4 * numel, self.dtype.itemsize * numel, 0)
        else:
            traffic.add(*self._gathered[rank])

    def put_gradients(self, rank: int, gradients: Sequence[Tensor]) -> None:
        """Those of whole parameters, to where they are sent from."""
        for gradient, pieces in zip(gradients, self.sources[rank], strict=True):
            _copy(pieces, _pieces(gradient, pieces))

    def scatter(self, rank: int) -> None:
        """Called on all ranks, each in its thread: the masters' gradients become the mean of the ranks' own."""
        end, reduced_R = self.ends[rank], self._reduced_WR[rank]
        end.scatter(reduced_R, self._gradients_WSR[rank].view(-1), end.unit.layout.process_group, dist.ReduceOp.AVG)
        if end.between is not None:
            end.between(reduced_R)

    def _places(self, rows_SR: Tensor) -> Iterator[list[Tensor]]:
        """For each parameter what rows have of it, in order: (n, numel) of n whole shards, and the rest of one."""
        start = 0
        for shard in self.shards:
            here = rows_SR[:, start : start + shard.numel]
            whole = sum(valid == shard.numel for valid in shard.valid)
            rest = shard.valid[whole] if whole < len(shard.valid) else 0
            yield [here[:whole], *([here[whole, :rest]] if rest else [])]
            start += shard.numel

    def _cut_masters(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        start = 0
        for shard in self.shards:
            parts = []
            for rank, valid in enumerate(shard.valid):
                shape = (-1, *shard.shape[1:])
                part = nn.Parameter(self._masters_SR[rank, start : start + valid].view(shape))
                part.grad = self._reduced_WR[rank, start : start + valid].view(shape)
                parts.append(part)
            yield shard.name, parts
            start += shard.numel


def _attach(rows: Rows, recipe: commq.Recipe, number: int, outer: Any) -> Attached:
    identity: Callable[[Any], ThreadTransport] = lambda group: group  # noqa: E731
    unit = Unit(rows, recipe, number, hybrid=outer is not None, backend="auto", connect=identity)
    between = BetweenHosts(unit, outer) if outer is not None else None
    return Attached(unit, WeightGather(unit), GradientScatter(unit), between)


def _pieces(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A contiguous tensor, cut as `_places` are."""
    cut = whole.reshape(-1).split([piece.numel() for piece in like])
    return [part.view(piece.shape) for part, piece in zip(cut, like, strict=True)]


def _copy(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    for a, b in zip(to, of, strict=True):
        a.copy_(b)
