"""State of sharded training: saved by rank, restored to the bit, re-sharded for another number of ranks.

Rules at another number: references are cut anew, so differences go on as they were. Residuals of the ranks' own
gradients are put together to whole parameters; new rank r takes the sum of those of the old ranks j with
j mod world_size == r, as without sharding, so the sum over ranks is kept (between hosts: the sum over hosts). Residuals
of a second hop start from zero: they belong to hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from commq.attach.fsdp_attached import Attached
from commq.codecs.reference import load_residual, store_residual

State = dict[str, Any]


def unit_state(each: Attached) -> State:
    tracker = each.gather.tracker
    own = tracker.own.clone() if tracker is not None and (tracker.known or tracker.has_own) else each.gather.saved
    return {
        "steps": each.unit.steps,
        "progress": each.unit.progress.state_dict(),
        "traffic": {name: [t.raw, t.sent, t.leaving] for name, t in each.traffics.items()},
        "residuals": {name: residual.state_dict() for name, residual in each.residuals.items()},
        "reference": torch.zeros(0) if own is None else own,
        "shards": [[s.name, list(s.shape), s.dim] for s in each.unit.layout.shards],
    }


def load_unit(each: Attached, state: State) -> None:
    layout = each.unit.layout
    expected = [[s.name, list(s.shape), s.dim] for s in layout.shards]
    if state["shards"] != expected:
        raise ValueError(f"the state is of parameters {state['shards']}, the module has {expected}")
    each.unit.steps = state["steps"]
    each.unit.progress.load_state_dict(state["progress"])
    for name, traffic in each.traffics.items():
        traffic.raw, traffic.sent, traffic.leaving = state["traffic"].get(name, [0, 0, 0])
    unit = each.unit.recipe.unit
    for name, residual in each.residuals.items():
        numels = {s.name: -(-s.numel // unit) * unit if name == "second" else s.numel for s in layout.shards}
        for key, values in state["residuals"][name]["values"].items():
            expected_numel = numels.get(key.rpartition("#")[0], 0)
            if values.numel() != expected_numel:
                raise ValueError(
                    f"the state's residual {key!r} has {values.numel()} elements, the shard has {expected_numel}; at "
                    "another world size, commq.fold the states first"
                )
        residual.load_state_dict(state["residuals"][name])
    reference = state["reference"]
    if reference.numel() == 0:
        each.gather.forget()
    elif reference.numel() != sum(s.numel for s in layout.shards):
        raise ValueError(
            f"the state's reference has {reference.numel()} elements, the rank's shards have "
            f"{sum(s.numel for s in layout.shards)}; at another world size, commq.fold the states first"
        )
    else:
        each.gather.restore(reference)


def fold_shards(states: list[State], world_size: int, replicas: int = 1) -> list[State]:
    """The state of every new rank, in the mesh's order, from that of every old one, in any order.

    world_size: ranks that parameters are sharded over; replicas: of those, for a mesh (replicas, world_size). At the
    same sizes the states come back unchanged, to the bit.
    """
    old_replicas, old_size = states[0]["mesh"]
    if len(states) != old_replicas * old_size:
        raise ValueError(f"fold: {len(states)} states, expected those of all {old_replicas * old_size} ranks")
    if (old_replicas, old_size) == (replicas, world_size):
        return states
    states = sorted(states, key=lambda state: state["rank"])
    ranks = range(replicas * world_size)
    folded: list[State] = [{"mesh": [replicas, world_size], "rank": rank, "units": {}} for rank in ranks]
    for name in states[0]["units"]:
        units = [state["units"][name] for state in states]
        for rank, unit in enumerate(_fold_unit(units, old_size, world_size, replicas)):
            folded[rank]["units"][name] = unit
    return folded


def _fold_unit(units: list[State], old_size: int, world_size: int, replicas: int) -> list[State]:
    like = units[0]
    shards: list[tuple[str, list[int], int]] = [tuple(shard) for shard in like["shards"]]
    ranks = replicas * world_size
    folded = [{**unit, "residuals": {}} for unit in [like] * ranks]
    if like["reference"].numel():
        rows = [unit["reference"].split([_numel(s, old_size) for s in shards]) for unit in units[:old_size]]
        wholes = [_join([row[i] for row in rows], shard) for i, shard in enumerate(shards)]
        cut = [_cut(whole, shard, world_size) for whole, shard in zip(wholes, shards, strict=True)]
        for rank in range(ranks):
            folded[rank]["reference"] = torch.cat([parts[rank % world_size] for parts in cut])
    for kind, residual in like["residuals"].items():
        for rank in range(ranks):
            folded[rank]["residuals"][kind] = {**residual, "values": {}, "scales": {}}
        if kind == "second":
            continue
        # Each owner of a whole residual: a rank, which has a row for each shard; or a host, whose ranks have one each.
        if kind == "first":
            owners = [[unit] * old_size for unit in units]
            count = ranks
        else:
            owners = [units[first : first + old_size] for first in range(0, len(units), old_size)]
            count = replicas
        for shard in shards:
            if f"{shard[0]}#0" not in residual["values"]:
                continue
            wholes = [_whole_residual(owner, kind, shard) for owner in owners]
            for new in range(count):
                total = torch.stack([*wholes[new::count], torch.zeros_like(wholes[0])]).sum(dim=0)
                for row, part in enumerate(_cut(total, shard, world_size)):
                    rank, place = (new, row) if kind == "first" else (new * world_size + row, 0)
                    _store(folded[rank]["residuals"][kind], f"{shard[0]}#{place}", part, like=residual, old=shard[0])
    return folded


def _whole_residual(owner: Sequence[State], kind: str, shard: tuple[str, list[int], int]) -> Tensor:
    parts = []
    for row, unit in enumerate(owner):
        residual, key = unit["residuals"][kind], f"{shard[0]}#{row if kind == 'first' else 0}"
        parts.append(load_residual(residual["values"][key], residual["scales"].get(key), residual["block"]))
    return _join(parts, shard)


def _store(residual: State, key: str, part: Tensor, *, like: State, old: str) -> None:
    first = like["values"][f"{old}#0"]
    values = torch.zeros(part.numel(), dtype=first.dtype)
    scales = torch.zeros(-(-part.numel() // like["block"])) if f"{old}#0" in like["scales"] else None
    store_residual(part, part.isfinite(), values, scales, like["block"])
    residual["values"][key] = values
    if scales is not None:
        residual["scales"][key] = scales


def _numel(shard: tuple[str, list[int], int], world_size: int) -> int:
    _, shape, dim = shard
    return -(-shape[dim] // world_size) * int(torch.Size(shape[:dim] + shape[dim + 1 :]).numel())


def _join(parts: list[Tensor], shard: tuple[str, list[int], int]) -> Tensor:
    """A whole parameter from its padded shards."""
    _, shape, dim = shard
    step = -(-shape[dim] // len(parts))
    padded = [part.view(*shape[:dim], step, *shape[dim + 1 :]) for part in parts]
    return torch.cat(padded, dim=dim).narrow(dim, 0, shape[dim])


def _cut(whole: Tensor, shard: tuple[str, list[int], int], world_size: int) -> list[Tensor]:
    """Padded shards of a whole parameter, flat."""
    _, shape, dim = shard
    step = -(-shape[dim] // world_size)
    padded = whole.new_zeros(*shape[:dim], step * world_size, *shape[dim + 1 :])
    padded.narrow(dim, 0, shape[dim]).copy_(whole)
    return [part.reshape(-1) for part in padded.split(step, dim=dim)]
