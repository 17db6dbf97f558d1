"""Which transport serves what a caller passes as `group=`."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from commq.collectives.transport import C10d, Transport

Group = dist.ProcessGroup | DeviceMesh
"""A process group or a DeviceMesh of one dimension. None is torch's default group."""


def transport_of(group: Group | None) -> Transport:
    """The transport of a group. TypeError for what is none, ValueError for a mesh of several dimensions."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return C10d(group)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            example = f"mesh[{names[0]!r}]" if names else "a mesh with mesh_dim_names, then mesh[name]"
            raise ValueError(f"group: a DeviceMesh of {group.ndim} dimensions, expected one; pass {example}")
        return C10d(group.get_group())
    raise TypeError(f"group: got {type(group).__name__}, expected a ProcessGroup or a DeviceMesh of one dimension")
