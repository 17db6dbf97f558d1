"""Which transport serves what a caller passes as `group=`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from commq.collectives.transport import C10d, Transport

if TYPE_CHECKING:
    from mpi4py import MPI

    Group = dist.ProcessGroup | DeviceMesh | MPI.Comm
else:
    Group = dist.ProcessGroup | DeviceMesh | Any  # mpi4py need not be installed
"""A process group, a DeviceMesh of one dimension, or a communicator of mpi4py. None is torch's default group."""


def transport_of(group: Group | None) -> Transport:
    """The transport of a group. TypeError for what is none, ValueError for a mesh of several dimensions.

    A communicator's first call is collective: all of its ranks make it.
    """
    if group is None or isinstance(group, dist.ProcessGroup):
        return C10d(group)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            example = f"mesh[{names[0]!r}]" if names else "a mesh with mesh_dim_names, then mesh[name]"
            raise ValueError(f"group: a DeviceMesh of {group.ndim} dimensions, expected one; pass {example}")
        return C10d(group.get_group())
    mpi = sys.modules.get("mpi4py.MPI")  # whoever has a communicator has imported it
    if mpi is not None and isinstance(group, mpi.Comm):
        from commq.collectives.mpi import Mpi

        return Mpi.of(group)
    raise TypeError(
        f"group: got {type(group).__name__}, expected a ProcessGroup, a DeviceMesh of one dimension, or a communicator "
        "of mpi4py"
    )
