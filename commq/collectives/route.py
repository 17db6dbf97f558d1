"""Routes: the schedules by name, what each can do, and the one that a message takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from commq.codecs.formats import Format, get_format
from commq.codecs.reference import Coding
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.auto import pick
from commq.collectives.hosts import find_hosts
from commq.collectives.integer_sum import integer_sum
from commq.collectives.levels import THC_TABLES
from commq.collectives.message import Message
from commq.collectives.one_bit import one_bit
from commq.collectives.one_shot import one_shot
from commq.collectives.plain import plain
from commq.collectives.plan import Plan, Source, make_plan, make_plans
from commq.collectives.ring import ring
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Transport
from commq.collectives.two_hop import two_hop
from commq.collectives.two_shot import two_shot

SCHEDULES: dict[str, Callable[[Message], Schedule]] = {
    "two_shot": two_shot,
    "one_shot": one_shot,
    "two_hop": two_hop,
    "ring": ring,
    "integer_sum": integer_sum,
    "thc": partial(integer_sum, table=THC_TABLES[4]),
    "one_bit": one_bit,
    "plain": plain,
}

_KINDS = {
    "integer_sum": (("integer", "sign"), "its codes would be added as integers; use int8, int4, int2 or sign"),
    "thc": (("integer",), "its table has levels for 4 bits; use int4"),
    "one_bit": (("sign",), "its merge chooses between two signs; use sign"),
}
"""Formats of the schedules that do not take all, and why; raw ones travel as they are by any."""
_NO_RESIDUAL = ("ring",)
_ANSWER_RESIDUAL = ("two_shot", "two_hop")
AUTO = ("one_shot", "two_shot", "two_hop")
"""What "auto" chooses from, besides plain; the last only where hosts have several ranks."""


@dataclass(frozen=True)
class Route:
    """How a message travels: its schedule, and the pieces it is cut in."""

    name: str
    plans: tuple[Plan, ...]

    def build(self, message: Message) -> Schedule:
        return SCHEDULES[self.name](message)


def check_schedule(name: str, fmt: Format, *, residual: bool = False, answer_residual: bool = False) -> None:
    """ValueError for a schedule that is unknown, or cannot do what is asked of it, with the reason."""
    if name not in ("auto", *SCHEDULES):
        raise ValueError(f"schedule {name!r} is unknown; expected auto, {', '.join(SCHEDULES)}")
    kinds, reason = _KINDS.get(name, ((fmt.kind,), ""))
    if fmt.kind not in (*kinds, "raw"):
        raise ValueError(f"schedule {name!r} with format {fmt.name!r}: {reason}, or schedule two_shot")
    if residual and name in _NO_RESIDUAL:
        raise ValueError(f"schedule {name!r} keeps no residual; expected two_shot or another")
    if answer_residual and name not in _ANSWER_RESIDUAL:
        raise ValueError(f"schedule {name!r} with answer_residual: expected {' or '.join(_ANSWER_RESIDUAL)}, by name")


def inside_format(fmt: Format) -> Format:
    """What `fmt` between hosts goes with inside them, unless told otherwise: int8 where it has fewer bits."""
    return get_format("int8", block=fmt.block) if fmt.kind != "raw" and fmt.bits < 8 else fmt


def find_route(
    name: str,
    sources: tuple[Source, ...],
    coding: Coding,
    transport: Transport,
    *,
    device: torch.device,
    backend: str = "auto",
    narrow: bool = False,
) -> Route:
    """The route of a message by the schedule `name`; by measurement if that is "auto". The same on all ranks.

    narrow: as `pick`'s.
    """
    plans = make_plans(sources, world_size=transport.world_size, piece_bytes=PIECE_BYTES[device.type])
    if name == "auto":
        names = AUTO if find_hosts(transport).has_two_levels else AUTO[:-1]
        candidates = {n: SCHEDULES[n] for n in names}
        name = pick(
            candidates,
            sources,
            plans,
            coding,
            transport,
            device=device,
            backend=backend,
            narrow=narrow,
        )
    if name == "plain":
        plans = (make_plan(sources, world_size=transport.world_size),)
    return Route(name, plans)
