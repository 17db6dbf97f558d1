"""What DDP's hook costs in memory, found by a rehearsal on tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size
from torch.nn.parallel import DistributedDataParallel

from commq.attach.answer_residual import AnswerResidual
from commq.attach.bucket import Coded, Member, Raw, bind_answers, lay, make_bucket
from commq.attach.estimated import MemoryEstimate
from commq.attach.idle import SILENT, Idle, nbytes
from commq.codecs.reference import Coding
from commq.collectives.hosts import find_hosts
from commq.collectives.route import find_route
from commq.collectives.schedule import Exchange
from commq.feedback.residual import Residual
from commq.recipe import Recipe


def estimate_buckets(
    model: nn.Module, recipe: Recipe, world_size: int, *, bucket_cap_mb: float | None, hosts: int
) -> MemoryEstimate:
    """What `register(DistributedDataParallel(model), recipe)` will take: see `estimate_memory`."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if world_size == 1 or not named:
        return MemoryEstimate()
    transport = Idle(world_size, hosts, gloo=named[0][1].device.type == "cpu")
    rehearsal = _Rehearsal(recipe, transport, torch.device("cpu" if transport.gloo else "cuda"))
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

    def __init__(self, recipe: Recipe, transport: Idle, device: torch.device) -> None:
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
        copied = nbytes(*(coded.x_N for coded in laid.coded if coded.places))
        transport.counter.count(copied + nbytes(*(raw.x_N for raw in laid.raw)))
        left = len(laid.messages)

        def ended() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                transport.counter.count(-copied)

        for message in laid.messages:
            self.exchange.add(route.build(replace(message, codec=SILENT)), ended)

    def _count(self, group: Coded | Raw) -> None:
        if isinstance(group, Raw):
            return
        if group.residual is not None:
            self.residual_bytes += nbytes(group.residual.values, group.residual.scales)
        self.answer_bytes += nbytes(group.answer_residual)
        for blocks in (group.blocks, group.answer_blocks):
            self.table_bytes += nbytes(blocks.ids_G, blocks.valid_G) if blocks is not None else 0
