"""Costs: which schedule a message should travel by. Integers only, so all ranks decide alike.

A piece costs the time of its moves, by the curves of `link.py`, and that of its codecs, by those of `rehearsal.py`.
Pieces overlap, so of a long message only the greater of the two counts in full, and the lesser for one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from commq.collectives.hosts import Hosts
from commq.collectives.link import Curve
from commq.collectives.one_shot import row_bytes
from commq.collectives.plan import Plan

WORTH = 9, 10
"""A message is compressed where that should take less than 9 / 10 of the plain all-reduce's time: predictions err."""


@dataclass(frozen=True)
class Costs:
    """Measured times in one group, of messages of one kind: formats, dtype, rotation, device."""

    moves: Mapping[str, Curve]
    """An all-to-all among "all" ranks, "inside" hosts and "between" them, by the bytes that each rank sends."""
    sums: Curve
    """The library's all-reduce, by the bytes of the tensor."""
    codecs: Mapping[str, Curve]
    """Of each schedule that may be chosen: all but its moves, by the bytes of the tensor."""
    hosts: Hosts | None = None
    """Where ranks stand; for two_hop."""
    narrow: bool = False
    """Plain means that float32 is summed as bfloat16; `sums` are those of bfloat16."""


def predict(schedule: str, plans: Sequence[Plan], costs: Costs) -> int:
    """Nanoseconds that a message will take."""
    if schedule == "plain":
        return costs.sums.nanoseconds(sum(plan.nbytes for plan in plans) // (2 if costs.narrow else 1))
    pieces = [_hops(schedule, plan, costs.hosts) for plan in plans]
    first = sum(costs.moves[among].nanoseconds(nbytes) for among, nbytes in pieces[0])
    codecs = [costs.codecs[schedule].nanoseconds(plan.nbytes) for plan in plans]
    if len(plans) == 1:
        return first + codecs[0]
    # The moves of all pieces follow each other without a gap, like one long move for each hop.
    moves = sum(
        costs.moves[hop[0][0]].nanoseconds(sum(nbytes for _, nbytes in hop)) for hop in zip(*pieces, strict=True)
    )
    return max(moves, sum(codecs)) + min(first, codecs[0])


def choose(plans: Sequence[Plan], costs: Costs) -> str:
    """The schedule that should take the shortest; plain unless another is clearly shorter."""
    times = {schedule: predict(schedule, plans, costs) for schedule in costs.codecs}
    best = min(times, key=lambda schedule: times[schedule])
    return best if times[best] * WORTH[1] < predict("plain", plans, costs) * WORTH[0] else "plain"


def _hops(schedule: str, plan: Plan, hosts: Hosts | None) -> tuple[tuple[str, int], ...]:
    """Among which ranks each hop is, and the bytes that each rank sends to others in it."""
    others = plan.world_size - 1
    if schedule == "one_shot":
        return (("all", others * row_bytes(plan.parts)),)
    if schedule == "two_hop":
        assert hosts is not None and hosts.ranks_per_host is not None
        run, inside, between = hosts.count, hosts.ranks_per_host - 1, hosts.count - 1
        return (
            ("inside", inside * run * plan.inside_bytes),
            ("between", between * plan.row_bytes),
            ("between", between * plan.answer_bytes),
            ("inside", inside * run * plan.answer_bytes),
        )
    return ("all", others * plan.row_bytes), ("all", others * plan.answer_bytes)
