"""schedule="auto": measure what is missing, predict, and where the prediction is close, try it.

Predictions are made from curves that all messages of a group share. Short messages are where they err: what the host
does between the moves counts there, and compression may lose. So what was chosen for a short message runs against
plain before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from commq.codecs.formats import get_format
from commq.codecs.reference import Coding
from commq.collectives import link
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.cost import WORTH, Costs, choose, predict
from commq.collectives.hosts import find_hosts
from commq.collectives.message import Message, Operand, make_messages
from commq.collectives.plain import plain
from commq.collectives.plan import Plan, Source, make_plan
from commq.collectives.rehearsal import Rehearsal, rehearse
from commq.collectives.schedule import Exchange, Schedule
from commq.collectives.transport import Transport

Build = Callable[[Message], Schedule]
TRIED = 10_000_000
"""Nanoseconds: where the plain all-reduce should take less, what seems faster is tried."""


def pick(
    candidates: Mapping[str, Build],
    sources: tuple[Source, ...],
    plans: tuple[Plan, ...],
    coding: Coding,
    transport: Transport,
    *,
    device: torch.device,
    backend: str,
    narrow: bool = False,
) -> str:
    """The name of the candidate, or "plain", that a message should travel by. The same on all ranks.

    narrow: all tensors are float32, and would be summed as bfloat16 if they travelled plain.
    The first call of a group for formats, dtype and device measures; it takes as long as some exchanges of 4 MiB.
    Messages of about the same lengths share what was chosen for the first of them.
    """
    coding = replace(coding, seed=0, step=0)
    key = ("picked", _kinds(sources), coding, device, backend, narrow, *candidates)
    facts = transport.memory.facts
    if key not in facts:
        costs = find_costs(
            candidates,
            sources[0],
            coding,
            transport,
            device=device,
            backend=backend,
            narrow=narrow,
        )
        name = choose(plans, costs)
        if name != "plain" and predict("plain", plans, costs) < TRIED:
            generator = torch.Generator(device).manual_seed(0)
            tensors = [torch.randn(s.numel, generator=generator, device=device).to(s.dtype) for s in sources]
            whole, alike = tensors, sources
            if narrow:
                whole = [torch.cat(tensors)]
                alike = (Source(whole[0].numel(), torch.float32, get_format("bf16"), get_format("bf16")),)
            as_it_is = (make_plan(alike, world_size=transport.world_size),)
            times = {
                name: _time(candidates[name], plans, tensors, coding, transport, transport, backend),
                "plain": _time(plain, as_it_is, whole, Coding(), transport, transport, backend),
            }
            name = name if times[name] * WORTH[1] < times["plain"] * WORTH[0] else "plain"
        facts[key] = name
    picked: str = facts[key]
    return picked


def _kinds(sources: tuple[Source, ...]) -> tuple[tuple[Source, int], ...]:
    """Each kind of source, and how many elements there are of it, to four binary digits: all that a choice is kept by.

    Of lengths that never repeat there are few kinds; each is measured once, and does not grow the group's memory.
    """
    numels: dict[Source, int] = {}
    for source in sources:
        kind = replace(source, numel=0)
        numels[kind] = numels.get(kind, 0) + source.numel
    return tuple((kind, n >> (low := max(0, n.bit_length() - 4)) << low) for kind, n in numels.items())


def _time(
    build: Build,
    plans: Sequence[Plan],
    tensors: Sequence[Tensor],
    coding: Coding,
    over: Transport,
    transport: Transport,
    backend: str,
) -> int:
    """Nanoseconds of an exchange of `tensors` over `over`; the ranks of `transport` do it together and agree."""
    operands = [Operand(x_N, torch.empty_like(x_N), coding) for x_N in tensors]

    def call() -> None:
        Exchange(map(build, make_messages(plans, operands, over, average=True, backend=backend))).finish()

    return link.agree(transport, link.time_call(call, tensors[0].device))


def find_costs(
    candidates: Mapping[str, Build],
    source: Source,
    coding: Coding,
    transport: Transport,
    *,
    device: torch.device,
    backend: str,
    narrow: bool = False,
) -> Costs:
    """The costs of messages of `source`'s kind: from the group's memory, else measured, which all ranks do together."""
    hosts = find_hosts(transport)
    ways = ("all", "inside", "between") if "two_hop" in candidates else ("all",)
    return Costs(
        moves={among: link.moves(transport, device, among, hosts) for among in ways},
        sums=link.sums(transport, torch.bfloat16 if narrow else source.dtype, device),
        codecs={
            name: _codecs(name, build, source, coding, transport, device, backend) for name, build in candidates.items()
        },
        hosts=hosts,
        narrow=narrow,
    )


def _codecs(
    name: str,
    build: Build,
    source: Source,
    coding: Coding,
    transport: Transport,
    device: torch.device,
    backend: str,
) -> link.Curve:
    def time_of(x_N: Tensor) -> int:
        plan = make_plan((replace(source, numel=x_N.numel()),), world_size=transport.world_size)
        return _time(build, [plan], [x_N], coding, Rehearsal(transport), transport, backend)

    key = ("codecs", name, replace(source, numel=0), coding, device, backend)
    return link.remember(transport, key, lambda: rehearse(time_of, PIECE_BYTES[device.type], source.dtype, device))
