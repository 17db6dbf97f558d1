"""Wires: how a differentiable exchange sends values forward and gradients backward.

Graphs that torch.compile makes hold strings and numbers, not formats or groups: both travel by name in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from commq.codecs.formats import Format
from commq.codecs.rotation import Rotation
from commq.collectives.arguments import resolve
from commq.collectives.route import check_schedule
from commq.collectives.transport import C10d

F = TypeVar("F", bound=Callable[..., Any])
BACKWARD_SEED = 1 << 31
"""Flipped in the seed of gradients: their random bits are not those of the values in the same step."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """The formats of both directions, and all that an exchange needs to know of them."""

    name: str
    """What its traffic is counted as."""
    format: Format
    backward: Format
    rounding: Literal["nearest", "stochastic"]
    rotation: Rotation | None
    seed: int
    schedule: str = "two_shot"
    """Of all-reduces."""

    def options(self, step: int, *, backward: bool) -> dict[str, Any]:
        """Keyword arguments of the collectives for one direction."""
        fmt = self.backward if backward else self.format
        return {
            "format": fmt,
            "rounding": self.rounding,
            "rotation": None if fmt.kind == "raw" else self.rotation,  # there is no scale that it could help
            "seed": self.seed ^ BACKWARD_SEED if backward else self.seed,
            "step": step,
        }


_WIRES: dict[str, Wire] = {}


def _constant(function: F) -> F:
    """As torch.compiler.assume_constant_result, which would import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def intern_wire(*about: Any) -> str:
    """The key of a wire, which says all about it: no two wires share one, in whatever process.

    about: name, format, backward (None: as format), rounding, rotation, seed, and the schedule of all-reduces if it is
    not two_shot. ValueError for what does not go together.
    """
    return _intern(*about)


@lru_cache(maxsize=1024)
def _intern(
    name: str,
    format: Format | str,
    backward: Format | str | None,
    rounding: Literal["nearest", "stochastic"],
    rotation: Rotation | int | None,
    seed: int,
    schedule: str = "two_shot",
) -> str:
    first, second, coding = resolve(format, backward, rounding, None, seed, 0)
    coded = [fmt for fmt in (first, second) if fmt.kind != "raw"] or [first]
    for fmt in coded:
        _, _, coding = resolve(fmt, None, rounding, rotation, seed, 0)
    for fmt in (first, second):
        check_schedule(schedule, fmt)
    wire = Wire(
        name=name,
        format=first,
        backward=second,
        rounding=rounding,
        rotation=coding.rotation,
        seed=seed,
        schedule=schedule,
    )
    key = repr(wire)
    _WIRES[key] = wire
    return key


def wire_of(key: str) -> Wire:
    """The wire that `intern_wire` gave a key."""
    return _WIRES[key]


def group_name(group: dist.ProcessGroup | DeviceMesh | str | None) -> str:
    """The name of a process group, or what already is one.

    TypeError for a communicator of MPI, ValueError for a mesh of several dimensions.
    """
    if isinstance(group, str):
        return group
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: a DeviceMesh of {group.ndim} dimensions, expected one; pass mesh[name]")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: got {type(group).__name__}, expected a ProcessGroup or a DeviceMesh of one dimension; call "
            "dist.init_process_group first"
        )
    name: str = group.group_name
    return name


def transport_named(name: str) -> C10d:
    """The transport of the group of this name."""
    resolve_group: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return C10d(resolve_group(name))


@_constant
def place_in(name: str) -> tuple[int, int]:
    """Rank and world size in the group of this name."""
    transport = transport_named(name)
    return transport.rank, transport.world_size
