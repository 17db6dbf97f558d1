"""Estimates: what compression costs in memory, found by a rehearsal on tensors without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size
from torch.nn.parallel import DistributedDataParallel

from commq.attach.answer_residual import AnswerResidual
from commq.attach.bucket import Coded, Member, Raw, bind_answers, lay, make_bucket
from commq.codecs.reference import Coding
from commq.collectives.hosts import HOSTS, Hosts, find_hosts
from commq.collectives.memory import Memory
from commq.collectives.route import find_route
from commq.collectives.schedule import Exchange
from commq.collectives.transport import Move
from commq.feedback.residual import Residual
from commq.recipe import Recipe
from commq.recipes import recipe as get_recipe


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank, besides what DDP itself takes."""

    residual: int
    """Of the first hop: every element that is encoded with feedback, on every rank."""
    answer_residual: int
    """Of the second hop, float32: the elements that this rank owns."""
    tables: int
    """Numbers of blocks, for stochastic rounding and sign."""
    wire: int
    """Buffers that are sent, received, or hold aligned copies: most at any time of a step. They are lent, not kept."""

    @property
    def total(self) -> int:
        return self.residual + self.answer_residual + self.tables + self.wire


def estimate_memory(
    model: nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any],
    world_size: int,
    *,
    bucket_cap_mb: float | None = None,
    hosts: int = 1,
) -> MemoryEstimate:
    """What `register(DistributedDataParallel(model), recipe)` will take on one rank of `world_size`. Nothing is sent.

    model: on any device, "meta" too; a model on the CPU is taken to use gloo, which needs a copy for all-gathers.
    bucket_cap_mb: DDP's. hosts: for schedule two_hop, with as many ranks on each. "auto" counts as two_shot. Buckets
    are cut as DDP cuts them after its first step, where that follows the order of parameters.
    """
    resolved = recipe if isinstance(recipe, Recipe) else get_recipe(recipe)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if world_size < 1 or world_size % hosts:
        raise ValueError(f"world_size={world_size}, hosts={hosts}: expected a multiple of the hosts, at least 1")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if world_size == 1 or not named:
        return MemoryEstimate(residual=0, answer_residual=0, tables=0, wire=0)
    transport = _Idle(world_size, hosts, gloo=named[0][1].device.type == "cpu")
    rehearsal = _Rehearsal(resolved, transport, torch.device("cpu" if transport.gloo else "cuda"))
    for bucket in _cut(named, bucket_cap_mb):
        rehearsal.run(bucket)
    rehearsal.exchange.finish()
    return MemoryEstimate(
        residual=rehearsal.residual_bytes,
        answer_residual=rehearsal.answer_bytes,
        tables=rehearsal.table_bytes,
        wire=transport.counter.most,
    )


def _cut(named: list[tuple[str, nn.Parameter]], bucket_cap_mb: float | None) -> list[list[tuple[str, nn.Parameter]]]:
    """DDP's buckets: in reverse order, of 25 MiB, the first of 1 MiB, unless told otherwise."""
    named, cap = named[::-1], int((25.0 if bucket_cap_mb is None else bucket_cap_mb) * 2**20)
    caps = [_DEFAULT_FIRST_BUCKET_BYTES if bucket_cap_mb is None else cap, cap]
    meta = [torch.empty_like(p, device="meta") for _, p in named]
    indices, _ = _compute_bucket_assignment_by_size(meta, caps, [False] * len(meta))
    return [[named[i] for i in bucket] for bucket in indices]


class _Rehearsal:
    """The hook's work for one backward pass after another bucket, on meta tensors."""

    def __init__(self, recipe: Recipe, transport: _Idle, device: torch.device) -> None:
        self.recipe, self.transport, self.device = recipe, transport, device
        self.residual = Residual(recipe.feedback, recipe.format.block)
        self.answers = AnswerResidual(transport) if recipe.answer_feedback.rule != "none" else None
        self.residual_bytes = self.answer_bytes = self.table_bytes = 0
        self.exchange = Exchange()
        self._first_unit = 0

    def run(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        recipe, members, offset = self.recipe, [], 0
        for name, p in parameters:
            fmt, answer = recipe.formats_of(name, tuple(p.shape), p.numel(), len(recipe.phases))
            members.append(Member(name, offset, p.numel(), fmt, answer, self._first_unit))
            self._first_unit += -(-p.numel() // recipe.unit)
            offset += p.numel()
        buffer = torch.empty(offset, dtype=parameters[0][1].dtype, device="meta")
        transport, coding = self.transport, Coding(rounding=recipe.rounding, rotation=recipe.rotation)
        two_levels = find_hosts(transport).has_two_levels
        bucket = make_bucket(
            members, recipe, self.residual, world_size=transport.world_size, buffer=buffer, two_levels=two_levels
        )
        schedule = "two_shot" if recipe.schedule == "auto" or not bucket.sources else recipe.schedule
        route = find_route(schedule, bucket.sources, coding, transport, device=self.device)
        if self.answers is not None:
            bucket = bind_answers(bucket, route.plans, self.answers, recipe.unit, buffer.device)
        for group in bucket.groups:
            self._count(group)
        laid = lay(bucket, route.plans, buffer, coding, recipe.feedback.weight, transport, "reference")
        copied = _nbytes(*(raw.x_N for raw in laid.raw), *(coded.x_N for coded in laid.coded if coded.places))
        transport.counter.count(copied)
        left = len(laid.messages)

        def ended() -> None:
            nonlocal left
            left -= 1
            if left == 0 and not bucket.in_place:
                transport.counter.count(-copied)

        for message in laid.messages:
            self.exchange.add(route.build(replace(message, codec=_SILENT)), ended)

    def _count(self, group: Coded | Raw) -> None:
        if isinstance(group, Raw):
            return
        if group.residual is not None:
            self.residual_bytes += _nbytes(group.residual.values, group.residual.scales)
        self.answer_bytes += _nbytes(group.answer_residual)
        for blocks in (group.blocks, group.answer_blocks):
            self.table_bytes += _nbytes(blocks.ids_G, blocks.valid_G) if blocks is not None else 0


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Counter(Memory):
    """Counts bytes that are lent."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def count(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)

    def take(self, rows: int, nbytes: int, device: torch.device) -> Tensor:
        self.count(rows * nbytes)
        return torch.empty(rows, nbytes, dtype=torch.uint8, device="meta")

    def give(self, *buffers: Tensor) -> None:
        self.count(-sum(buffer.untyped_storage().nbytes() for buffer in buffers))


class _Idle:
    """Rank 0 of a group that moves nothing. gloo: all-gathers borrow copies, as those of C10d do there."""

    def __init__(self, world_size: int, hosts: int, gloo: bool) -> None:
        self.rank, self.world_size, self.gloo = 0, world_size, gloo
        self.counter = _Counter()
        self.memory: Memory = self.counter
        self.memory.facts[HOSTS] = Hosts(tuple(rank * hosts // world_size for rank in range(world_size)))

    def share(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def all_to_all(self, *_: Any) -> Move:
        return _Lent(self.counter, 0)

    all_to_all_v = broadcast = send = recv = all_to_all

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> Move:
        return _Lent(self.counter, out_WS.numel() if self.gloo else 0)

    def all_reduce(self, tensor: Tensor, op: Any) -> Move:
        return _Lent(self.counter, _nbytes(tensor))


class _Lent:
    """A move that holds `nbytes` until it is done."""

    def __init__(self, memory: _Counter, nbytes: int) -> None:
        self._memory, self._nbytes = memory, nbytes
        memory.count(nbytes)

    def wait(self) -> None:
        self._memory.count(-self._nbytes)


_SILENT = ModuleType("silent")
"""Codecs that do nothing."""
for _name in ("encode_bucket", "decode_bucket", "decode_sum_encode"):
    setattr(_SILENT, _name, lambda *_, **__: None)
setattr(_SILENT, "decode_sum", lambda wire_KS, layout, **_: torch.empty(layout.chunk_numel, device="meta"))  # noqa: B010
