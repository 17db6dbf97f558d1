"""Unit: one FSDP module that communicates, with its recipe, its counters and what its two collectives share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from commq.attach.fsdp_layout import Shard
from commq.codecs.reference import Coding
from commq.collectives.hosts import HOSTS, Hosts, find_hosts
from commq.collectives.sharded import leaving_bytes
from commq.collectives.transport import C10d, Transport
from commq.policy.phase import Progress
from commq.recipe import Recipe

_UNITS = 1 << 16
CAPTURE = "its step and phases live on the host, and a replay would not move them; run the step eagerly or compiled"
"""Why not in a CUDA graph."""


@dataclass
class Traffic:
    """Bytes that this rank sent in one kind of exchange."""

    raw: int = 0
    """What fp32 would have taken."""
    sent: int = 0
    leaving: int = 0
    """Of those sent, to other hosts."""

    def add(self, raw: int, sent: int, leaving: int) -> None:
        self.raw, self.sent, self.leaving = self.raw + raw, self.sent + sent, self.leaving + leaving


class Rows(Protocol):
    """What travels together, as a unit's collectives see it. `GroupLayout` reads it from FSDP2."""

    shards: tuple[Shard, ...]
    world_size: int
    process_group: dist.ProcessGroup

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of what the all-gather sends."""

    @property
    def divide_factor(self) -> float | None:
        """By what sums of gradients are divided; None: their number."""

    @property
    def all_reduces(self) -> bool:
        """Reduced gradients are not kept back from the all-reduce between hosts."""

    def reduced(self, row_numel: int) -> tuple[int, ...]:
        """Numbers of the shards in a reduce-scatter whose rows have `row_numel` elements."""


class Unit:
    """number: of the unit among those of the root module; units draw different random bits.

    connect: the transport of a group; each of the unit's groups has one.
    """

    def __init__(
        self,
        layout: Rows,
        recipe: Recipe,
        number: int,
        *,
        hybrid: bool,
        backend: str,
        connect: Callable[[dist.ProcessGroup], Transport] = C10d,
    ) -> None:
        self.layout, self.recipe, self.number, self.backend = layout, recipe, number, backend
        self._connect = connect
        self.hybrid = hybrid
        """Another all-reduce follows, between hosts: the shards' own exchanges are all inside."""
        self.steps = 0
        """Reduce-scatters so far."""
        self.progress = Progress(recipe.phases)
        self.weights, self.gradients = Traffic(), Traffic()
        self.members: tuple[int, ...] | None = None
        """Shards in the reduce-scatter that an all-reduce between hosts is about to follow."""
        self._transports: dict[dist.ProcessGroup, Transport] = {}

    def transport(self, group: dist.ProcessGroup) -> Transport:
        if group not in self._transports:
            self._transports[group] = self._connect(group)
        return self._transports[group]

    def is_secondary(self, transport: Transport) -> bool:
        """A gather by `transport` starts from what reshard_after_forward=int left on fewer ranks."""
        return transport is not self.transport(self.layout.process_group)

    def hosts(self, transport: Transport) -> Hosts | None:
        """The hosts to travel between in two hops; None: flat. The first call of a group is collective."""
        if self.hybrid or self.recipe.schedule not in ("two_hop", "auto"):
            return None
        hosts = find_hosts(transport)
        return hosts if hosts.has_two_levels else None

    def coding(self, *, weights: bool) -> Coding:
        """Weights keep theirs from the forward to the backward pass of a step: both see the same bits."""
        step = (2 * self.steps + weights) * _UNITS + self.number
        recipe = self.recipe
        if weights:
            return Coding(rounding=recipe.weights_rounding, seed=recipe.seed, step=step)
        return Coding(rounding=recipe.rounding, rotation=recipe.rotation, seed=recipe.seed, step=step)

    def shards(self, members: tuple[int, ...]) -> list[Shard]:
        return [self.layout.shards[i] for i in members]

    def count(
        self, traffic: Traffic, row_numel: int, sent: int, row_bytes: int, transport: Transport, hops: bool
    ) -> None:
        """Count an exchange of rows of `row_numel` elements, for which this rank sent `sent` bytes.

        row_bytes: of a row that travels to other hosts, too.
        """
        known = transport.memory.facts.get(HOSTS)
        leaving = leaving_bytes(row_bytes, known, transport.rank, hops=hops) if isinstance(known, Hosts) else 0
        traffic.add((transport.world_size - 1) * 4 * row_numel, sent, leaving)
