"""What FSDP2 calls after its reduce-scatter: the all-reduce of shards between hosts, encoded, with error feedback.

FSDP2's own HSDP reduces between replicas with the library's all-reduce, which cannot be replaced. So commq lets FSDP
shard over the inner dimension of the mesh only, and does what is left in `set_all_reduce_hook`. A residual is as long
as a shard: it costs little.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from commq.attach.fsdp_lanes import Lane, split
from commq.attach.fsdp_plans import gradient_lanes
from commq.attach.fsdp_unit import Traffic, Unit
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.message import Operand, make_messages
from commq.collectives.plan import Plan, Source, make_plans
from commq.collectives.schedule import Exchange
from commq.collectives.two_shot import two_shot
from commq.feedback.residual import Residual, Segment, Stored


class BetweenHosts:
    """All-reduce hook of one unit: `set_all_reduce_hook`. Runs on FSDP's all-reduce stream, blocks nothing."""

    def __init__(self, unit: Unit, group: dist.ProcessGroup) -> None:
        self.unit, self.group = unit, group
        self.traffic = Traffic()
        self.residual = Residual(unit.recipe.feedback, unit.recipe.format.block)
        self._partial: Tensor | None = None
        self._route: tuple[Hashable, list[Lane], tuple[Plan, ...], list[Stored | None]] | None = None

    def __call__(self, reduce_output: Tensor) -> None:
        """Average (or sum, if the user divides) a row of shards over the hosts, in place."""
        unit = self.unit
        if reduce_output.is_cuda:  # it is the reduce-scatter stream's, and may be freed before this stream has passed
            reduce_output.record_stream(torch.cuda.current_stream(reduce_output.device))
        members, unit.members = unit.members, None
        if members is None:  # shards of one rank: there was no reduce-scatter
            members = unit.layout.reduced(reduce_output.numel())
            unit.steps += 1
        if not unit.layout.all_reduces:  # set_requires_all_reduce(False): these gradients wait for the next ones
            self._partial = reduce_output.clone() if self._partial is None else self._partial + reduce_output
            reduce_output.zero_()
            return
        if self._partial is not None:
            reduce_output += self._partial
            self._partial = None
        self._exchange(reduce_output, members)

    def _exchange(self, row: Tensor, members: tuple[int, ...]) -> None:
        unit, transport = self.unit, self.unit.transport(self.group)
        lanes, plans, residuals = self._find_route(row, members)
        if unit.recipe.feedback.resets(unit.steps - 1):
            self.residual.zero_()
        coding, before = unit.coding(weights=False), transport.memory.sent_bytes
        tensors = split(lanes, row, 1)
        operands = [
            Operand(
                x,
                x,
                coding,
                residual_N=lost.values if lost else None,
                residual_scales_G=lost.scales if lost else None,
                decay=unit.recipe.feedback.weight,
            )
            for x, lost in zip(tensors, residuals, strict=True)
        ]
        average = unit.layout.divide_factor is None
        messages = make_messages(plans, operands, transport, average=average, backend=unit.backend)
        Exchange(map(two_shot, messages)).finish()
        for lane, x, lost in zip(lanes, tensors, residuals, strict=True):
            lane.put(x.view(1, -1), row.view(1, -1))
            if lost is not None:
                lane.clear_gaps(lost.values)
        sent = transport.memory.sent_bytes - before
        self.traffic.add(2 * (transport.world_size - 1) * 4 * -(-row.numel() // transport.world_size), sent, sent)

    def _find_route(
        self, row: Tensor, members: tuple[int, ...]
    ) -> tuple[list[Lane], tuple[Plan, ...], list[Stored | None]]:
        unit, recipe = self.unit, self.unit.recipe
        phase = unit.progress.at(unit.steps - 1)
        key = (members, row.dtype, phase)
        if self._route is None or self._route[0] != key:
            lanes = gradient_lanes(recipe, unit.shards(members), phase)
            sources = tuple(
                Source(
                    lane.numel,
                    row.dtype,
                    lane.format,
                    lane.answer,
                    lane.unit,
                    whole=recipe.rounding == "stochastic" and "raw" in (lane.format.kind, lane.answer.kind),
                )
                for lane in lanes
            )
            transport = unit.transport(self.group)
            plans = make_plans(sources, world_size=transport.world_size, piece_bytes=PIECE_BYTES[row.device.type])
            residuals = [self._bind(lane, source, row) for lane, source in zip(lanes, sources, strict=True)]
            self._route = key, lanes, plans, residuals
        return self._route[1:]

    def _bind(self, lane: Lane, source: Source, row: Tensor) -> Stored | None:
        world_size = self.unit.transport(self.group).world_size
        if self.residual.feedback.rule == "none" or lane.format.kind == "raw" or source.is_raw(world_size):
            return None
        segments = [
            Segment(f"{shard.name}#0", place, shard.numel)
            for shard, place in zip(lane.shards, lane.places, strict=True)
        ]
        return self.residual.bind(segments, lane.numel, row.device)
