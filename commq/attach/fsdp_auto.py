"""Schedule "auto" of sharded training: a unit's exchange is encoded where that was measured to be faster.

Elsewhere FSDP2's own collective runs, with the dtype and the operation that FSDP2 asks for: the bits are those of plain
FSDP2. Both ways are tried on random numbers when a group first exchanges a unit of its kind, and all ranks agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commq.attach.fsdp_lanes import Lane
from commq.codecs.ops import implementation
from commq.codecs.reference import Coding
from commq.collectives import link
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.cost import WORTH
from commq.collectives.decision import log_decision
from commq.collectives.hosts import Hosts
from commq.collectives.lost import name_lost_ranks
from commq.collectives.plan import Plan, Source, make_plan
from commq.collectives.schedule import Schedule, run
from commq.collectives.sharded import ShardMessage, Strip, scatter
from commq.collectives.transport import C10d, Transport

# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_plain(transport: Transport, out: Tensor, x: Tensor, *, async_op: bool = False) -> dist.Work | None:
    """What FSDP2 does by itself to gather parameters."""
    transport.memory.sent_bytes += (transport.world_size - 1) * x.nbytes
    return _call(transport, "all_gather", _all_gather, out, x, async_op=async_op)


def scatter_plain(transport: Transport, out: Tensor, x: Tensor, op: Any) -> None:
    """What FSDP2 does by itself to reduce gradients."""
    transport.memory.sent_bytes += (transport.world_size - 1) * out.nbytes
    _call(transport, "reduce_scatter", _reduce_scatter, out, x, op=op)


def pays(
    kind: Callable[[ShardMessage], Schedule],
    lanes: Sequence[Lane],
    plan: Plan,
    sent: Tensor,
    coding: Coding,
    transport: Transport,
    *,
    hosts: Hosts | None,
    backend: str,
) -> bool:
    """Whether an exchange should be encoded, the same on all ranks. The first call for its kind of message measures.

    kind: `scatter` of all W rows in `sent`, or `gather` of one. A unit is measured as its lane of most elements, and
    what travels as it is there pays nothing. The trial is of at most one piece (PIECE_BYTES).
    """
    if not lanes:
        return False
    most = max(range(len(lanes)), key=lambda i: lanes[i].numel)
    lane, part, dtype, device = lanes[most], plan.parts[most], sent.dtype, sent.device
    if part.layout.format.kind == "raw" and part.layout.format.bits >= 8 * dtype.itemsize:
        return False
    world_size = transport.world_size
    inside = part.inside.format if hosts and kind is scatter else None
    rows = sent.numel() if kind is scatter else world_size * sent.numel()
    source = Source(rows, dtype, lane.format, lane.format, lane.unit, inside)
    step = source.unit * world_size
    numel = max(step, min(rows, PIECE_BYTES[device.type] // dtype.itemsize) // step * step)
    trial = replace(source, numel=numel)
    coding = Coding(rounding=coding.rounding, rotation=coding.rotation)
    key = "pays", kind.__name__, trial, coding, hosts, device, backend
    facts = transport.memory.facts
    if key not in facts:
        plan = make_plan((trial,), world_size=world_size)
        codec = implementation(backend, device, *plan.formats)
        generator = torch.Generator(device).manual_seed(0)
        whole, own = (
            torch.randn(n, generator=generator, device=device).to(dtype) for n in (numel, numel // world_size)
        )
        x, out = (whole, own) if kind is scatter else (own, whole)

        def encoded() -> None:
            run(kind(ShardMessage(plan, [Strip(x, out, coding)], transport, codec, hosts)))

        def plain() -> None:
            if kind is scatter:
                scatter_plain(transport, out, x, dist.ReduceOp.SUM)
            else:
                gather_plain(transport, out, x)

        before = transport.memory.sent_bytes
        took, whole_took = (link.agree(transport, link.time_call(call, device)) for call in (encoded, plain))
        transport.memory.sent_bytes = before
        facts[key] = took * WORTH[1] < whole_took * WORTH[0]
        what = "reduce-scatters" if kind is scatter else "all-gathers"
        chosen = ("two_hop" if hosts else "flat") if facts[key] else "plain"
        log_decision(transport, what, chosen, lane.format, numel * dtype.itemsize)
    return bool(facts[key])


def _call(transport: Transport, operation: str, function: Any, *args: Any, **options: Any) -> dist.Work | None:
    assert isinstance(transport, C10d)  # no other transport has FSDP2's collectives
    try:
        work: dist.Work | None = function(*args, group=transport.group, **options)
    except RuntimeError as error:
        raise name_lost_ranks(transport.group, operation, error) from error
    return work
