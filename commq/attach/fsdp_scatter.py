"""What FSDP2 calls to reduce gradients: the ranks' sums by shard, encoded on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commq.attach.fsdp_auto import pays, scatter_plain
from commq.attach.fsdp_lanes import Lane, empty, split
from commq.attach.fsdp_plans import gradient_lanes, gradient_plan
from commq.attach.fsdp_unit import CAPTURE, Unit
from commq.codecs.ops import implementation
from commq.codecs.reference import Coding
from commq.collectives.capture import refuse_capture
from commq.collectives.hosts import Hosts
from commq.collectives.plan import Plan
from commq.collectives.schedule import run
from commq.collectives.sharded import ShardMessage, Strip, scatter
from commq.collectives.transport import Transport
from commq.feedback.residual import Residual, Segment, Stored
from commq.feedback.rule import Feedback


@dataclass(frozen=True)
class _Route:
    """What does not change while the same parameters have gradients."""

    key: tuple[Any, ...]
    lanes: list[Lane]
    plan: Plan
    plain: bool
    """Schedule auto leaves it to FSDP2's own collective."""
    residuals: list[Stored | None]
    second: list[Stored | None]


class GradientScatter:
    """FSDP2's reduce-scatter: `set_custom_reduce_scatter`.

    FSDP calls it on its own stream and uses the output there: everything is queued on the current stream, which is made
    to wait for the bytes; the host goes on. Sums are fp32; means are right to the bit where all ranks agree.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        block = unit.recipe.format.block
        feedback = Feedback() if unit.hybrid else unit.recipe.feedback
        self.residual = Residual(feedback, block)
        self.second_residual = Residual(Feedback() if unit.hybrid else unit.recipe.answer_feedback, block)
        self._route: _Route | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        unit, transport = self.unit, self.unit.transport(group)
        refuse_capture("commq.fully_shard", CAPTURE, input_tensor.device)
        numel = output_tensor.numel()
        members = unit.layout.reduced(numel)
        hosts = unit.hosts(transport)
        route = self._find_route(members, input_tensor, transport, hosts)
        if route.plain:
            before = transport.memory.sent_bytes
            scatter_plain(transport, output_tensor, input_tensor, op)
            self._count(members, numel, transport.memory.sent_bytes - before, output_tensor.nbytes, transport, None)
            return
        if unit.recipe.feedback.resets(unit.steps):
            self.residual.zero_()
        coding, before = unit.coding(weights=False), transport.memory.sent_bytes
        out = output_tensor.view(1, -1)
        landings = [empty(lane, out, output_tensor.dtype) for lane in route.lanes]
        sources = split(route.lanes, input_tensor, transport.world_size)
        strips = [
            Strip(
                x,
                landing.view(-1),
                coding if lane.format.kind != "raw" or lane.format == unit.recipe.format else Coding(),
                residual=lost.values if lost else None,
                residual_scales=lost.scales if lost else None,
                decay=unit.recipe.feedback.weight,
                second_residual=second.values if second else None,
            )
            for lane, x, landing, lost, second in zip(
                route.lanes, sources, landings, route.residuals, route.second, strict=True
            )
        ]
        codec = implementation(unit.backend, input_tensor.device, *route.plan.formats)
        run(scatter(ShardMessage(route.plan, strips, transport, codec, hosts, self._divisor(op, transport))))
        for lane, landing in zip(route.lanes, landings, strict=True):
            lane.put(landing, out)
        for lane, lost in zip(route.lanes, route.residuals, strict=True):
            if lost is not None:
                lane.clear_gaps(lost.values)
        sent = transport.memory.sent_bytes - before
        self._count(members, numel, sent, route.plan.row_bytes, transport, hosts)

    def _count(
        self,
        members: tuple[int, ...],
        numel: int,
        sent: int,
        row_bytes: int,
        transport: Transport,
        hosts: Hosts | None,
    ) -> None:
        unit = self.unit
        unit.count(unit.gradients, numel, sent, row_bytes, transport, hosts is not None)
        unit.members = members
        unit.steps += 1

    def _divisor(self, op: Any, transport: Transport) -> float:
        """FSDP asks for a mean, for a sum times a factor of the user's, or for a sum that it divides itself."""
        if op == dist.ReduceOp.AVG:
            return float(transport.world_size)
        if op == dist.ReduceOp.SUM:
            return 1.0
        factor = self.unit.layout.divide_factor
        if factor is None:
            raise RuntimeError(f"FSDP asks for {op}, expected AVG, SUM or PREMUL_SUM with a gradient divide factor")
        return factor

    def _find_route(self, members: tuple[int, ...], x: Tensor, transport: Transport, hosts: Hosts | None) -> _Route:
        unit, recipe, world_size = self.unit, self.unit.recipe, transport.world_size
        phase = unit.progress.at(unit.steps)
        key = (members, x.dtype, phase, transport, hosts)
        if self._route is not None and self._route.key == key:
            return self._route
        lanes = gradient_lanes(recipe, unit.shards(members), phase, inside=unit.hybrid)
        plan = gradient_plan(recipe, lanes, x.dtype, world_size, hops=hosts is not None)
        plain = self._is_plain(lanes, plan, x, transport, hosts)
        coded = [part.layout.format.kind != "raw" and not plain for part in plan.parts]
        self._route = _Route(
            key,
            lanes,
            plan,
            plain,
            [self._bind(self.residual, lane, world_size, x, on) for lane, on in zip(lanes, coded, strict=True)],
            [
                self._bind(self.second_residual, lane, hosts.count if hosts else 0, x, on and hosts is not None)
                for lane, on in zip(lanes, coded, strict=True)
            ],
        )
        return self._route

    def _is_plain(self, lanes: list[Lane], plan: Plan, x: Tensor, transport: Transport, hosts: Hosts | None) -> bool:
        unit = self.unit
        if unit.recipe.schedule != "auto":
            return False
        coding = unit.coding(weights=False)
        return not pays(scatter, lanes, plan, x, coding, transport, hosts=hosts, backend=unit.backend)

    def _bind(self, residual: Residual, lane: Lane, rows: int, x: Tensor, coded: bool) -> Stored | None:
        """The residual of a lane of `rows` rows; each shard's is known by its parameter and row.

        In the second hop padding has one, too: sums are still rotated there.
        """
        if residual.feedback.rule == "none" or not coded:
            return None
        segments = [
            Segment(
                f"{shard.name}#{row}",
                row * lane.numel + place,
                lane.padded(shard) if residual is self.second_residual else shard.numel,
            )
            for row in range(rows)
            for shard, place in zip(lane.shards, lane.places, strict=True)
        ]
        return residual.bind(segments, rows * lane.numel, x.device)
