"""What FSDP2 calls to gather parameters: every rank's shards, encoded on the way, the same bits on all ranks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from commq.attach.fsdp_auto import gather_plain, pays
from commq.attach.fsdp_lanes import Lane, empty
from commq.attach.fsdp_plans import weight_plan
from commq.attach.fsdp_unit import CAPTURE, Unit
from commq.codecs.ops import implementation
from commq.codecs.reference import Coding
from commq.collectives.capture import refuse_capture
from commq.collectives.plan import Plan
from commq.collectives.schedule import Schedule
from commq.collectives.sharded import ShardMessage, Strip, gather
from commq.collectives.transport import Move, Transport
from commq.collectives.work import Work, launch
from commq.feedback.tracker import Tracker

_Planned = Generator[Move, None, Plan | None]
"""A part of a schedule that returns the plan of what was encoded, if anything was."""


class WeightGather:
    """FSDP2's all-gather: `set_custom_all_gather`.

    Without async_op FSDP calls it on its all-gather stream and records an event there when it returns, so encoding, the
    exchange and decoding are all queued on that stream. With async_op FSDP calls it on the compute stream and later
    waits for the Work that it gets: all of it then runs on commq's side stream, and the wait orders the current stream
    after the decoding. On the CPU the wait decodes.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.tracker: Tracker | None = None
        self.saved: Tensor | None = None
        """Own row of a reference, restored before there was one."""
        self._routes: dict[Transport, tuple[list[Lane], Plan]] = {}
        self._plain: dict[Transport, bool] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP copies its own shards into the own row of this buffer. Differences: it is the reference itself."""
        layout = self.unit.layout
        row_numel = sum(shard.numel for shard in layout.shards)
        plain = any(self._plain.values())
        if plain or not self.unit.recipe.weights_difference or size[0] != layout.world_size * row_numel:
            return torch.empty(*size, dtype=dtype, device=device)
        if self.tracker is None or self.tracker.rows.dtype != dtype:
            self.tracker = Tracker(layout.world_size, row_numel, dtype, device)
            if self.saved is not None:
                self.tracker.restore(self.saved.to(device, dtype))
                self.saved = None
        return self.tracker.rows.view(-1)

    def forget(self) -> None:
        """Parameters were replaced: send them as they are next time."""
        self.saved = None
        if self.tracker is not None:
            self.tracker.forget()

    def restore(self, own: Tensor) -> None:
        """Continue from a reference's own row, as saved; the next gather tells the other ranks."""
        if self.tracker is None:
            self.saved = own
        else:
            self.tracker.restore(own.to(self.tracker.own))

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        transport = self.unit.transport(group)
        refuse_capture("commq.fully_shard", CAPTURE, input_tensor.device)
        if self._is_plain(input_tensor, transport):
            # FSDP holds the output, even if it is a reference that nobody will refine.
            self.tracker = self.saved = None
            before = transport.memory.sent_bytes
            started = gather_plain(transport, output_tensor, input_tensor, async_op=async_op)
            row_bytes = 0 if self.unit.is_secondary(transport) else input_tensor.nbytes
            sent = transport.memory.sent_bytes - before
            self.unit.count(self.unit.weights, input_tensor.numel(), sent, row_bytes, transport, False)
            return started
        schedule = self._schedule(output_tensor, input_tensor, transport)
        work = launch([schedule], [output_tensor], transport, async_op=async_op, touched=[input_tensor])
        return None if work is None else GatherWork(work)

    def _schedule(self, out: Tensor, x: Tensor, transport: Transport) -> Schedule:
        unit, memory, sent = self.unit, transport.memory, 0
        exchange = self._exchange(out, x, transport)
        while True:
            before = memory.sent_bytes  # other units' exchanges may go on while a move of this one is under way
            try:
                move = next(exchange)
            except StopIteration as end:
                row_bytes, hops = end.value
                break
            sent += memory.sent_bytes - before
            yield move
        unit.count(unit.weights, x.numel(), sent, row_bytes, transport, hops)

    def _exchange(self, out: Tensor, x: Tensor, transport: Transport) -> Generator[Move, None, tuple[int, bool]]:
        """Returns the bytes of a row that travels to other hosts, too, and whether in two hops."""
        unit = self.unit
        if unit.is_secondary(transport):
            yield from _plain(out, x, transport)
            return 0, False
        if unit.recipe.weights is None:
            yield from _plain(out, x, transport)
            return x.nbytes, False
        if self.tracker is not None and out.data_ptr() == self.tracker.rows.data_ptr():
            plan = yield from self._differences(self.tracker, x, transport)
            if plan is None:
                return x.nbytes, False
        else:
            lanes, plan = self._route(transport)
            rows, own = out.view(transport.world_size, -1), x.view(1, -1)
            landings = [empty(lane, rows, x.dtype) for lane in lanes]
            yield from self._gather(
                plan, [(lane, lane.take(own), y, False) for lane, y in zip(lanes, landings, strict=True)], transport
            )
            for lane, landing in zip(lanes, landings, strict=True):
                lane.put(landing, rows)
        return plan.row_bytes, unit.hosts(transport) is not None

    def _differences(self, tracker: Tracker, x: Tensor, transport: Transport) -> _Planned:
        """Bring the reference up to date. x: the own row's memory, which holds the new parameters."""
        rank = transport.rank
        if not tracker.known and not tracker.has_own:
            yield from _plain(tracker.rows.view(-1), x, transport)
            tracker.settle(rank)
            return None
        x = x.clone()
        tracker.rows[rank] = tracker.own
        if not tracker.known:
            yield from _plain(tracker.rows.view(-1), tracker.rows[rank], transport)
            tracker.known = True
        lanes, plan = self._route(transport)
        difference = tracker.difference(x).view(1, -1)
        exchanged = []
        for lane in lanes:
            coded = lane.format.kind != "raw"
            adds = coded and lane.in_place
            landing = tracker.rows if adds else empty(lane, tracker.rows, torch.float32 if coded else x.dtype)
            if landing.data_ptr() == tracker.rows.data_ptr() and not adds:
                landing = torch.empty_like(landing)
            exchanged.append((lane, lane.take(difference if coded else x.view(1, -1)), landing, adds))
        yield from self._gather(plan, exchanged, transport)
        for lane, _, landing, adds in exchanged:
            if not adds:
                lane.put(landing, tracker.rows, adds=lane.format.kind != "raw")
        tracker.settle(rank)
        return plan

    def _gather(self, plan: Plan, lanes: list[tuple[Lane, Tensor, Tensor, bool]], transport: Transport) -> Schedule:
        unit = self.unit
        coding = unit.coding(weights=True)
        strips = [
            Strip(x.view(-1), landing.view(-1), Coding() if lane.format.kind == "raw" else coding, adds=adds)
            for lane, x, landing, adds in lanes
        ]
        codec = implementation(unit.backend, strips[0].x.device, *plan.formats)
        yield from gather(ShardMessage(plan, strips, transport, codec, unit.hosts(transport)))

    def _is_plain(self, x: Tensor, transport: Transport) -> bool:
        """Whether schedule auto leaves this gather to FSDP2's own collective. The first call in a group measures."""
        unit = self.unit
        if unit.recipe.schedule != "auto":
            return False
        if unit.recipe.weights is None or unit.is_secondary(transport):
            return True
        if transport not in self._plain:
            lanes, plan = self._route(transport)
            coding, hosts = unit.coding(weights=True), unit.hosts(transport)
            self._plain[transport] = not pays(
                gather, lanes, plan, x, coding, transport, hosts=hosts, backend=unit.backend
            )
        return self._plain[transport]

    def _route(self, transport: Transport) -> tuple[list[Lane], Plan]:
        if transport not in self._routes:
            layout = self.unit.layout
            (dtype,) = layout.dtypes
            self._routes[transport] = weight_plan(self.unit.recipe, layout.shards, dtype, transport.world_size)
        return self._routes[transport]


class GatherWork(dist.Work):
    """What FSDP waits for: only a torch Work is."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def wait(self, timeout: timedelta | None = None) -> bool:
        return self._work.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed()


def _plain(out: Tensor, x: Tensor, transport: Transport) -> Schedule:
    """The elements as they are, of any dtype."""
    yield transport.all_gather(x.view(torch.uint8), out.view(torch.uint8).view(transport.world_size, -1))
