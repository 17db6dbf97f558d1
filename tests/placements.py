"""Placements: ranks of one machine that pretend to be on several hosts."""

import pytest
import torch.distributed as dist

from commq.collectives.group import transport_of
from commq.collectives.hosts import HOSTS, Hosts

COUNTS = {4: (2,), 6: (2, 3), 8: (4, 2), 12: (3,), 16: (4,)}
"""Numbers of hosts that so many ranks pretend to be on."""


def neighbours(world_size, hosts):
    return Hosts(tuple(rank // (world_size // hosts) for rank in range(world_size)))


def dealt(world_size, hosts):
    return Hosts(tuple(rank % hosts for rank in range(world_size)))


def to_and_fro(world_size, hosts):
    """Ranks 0 1 2 2 1 0 0 1 2: the order of hosts is another one for every second rank of a host."""
    return Hosts(tuple(abs(rank % hosts - (hosts - 1) * (rank // hosts % 2)) for rank in range(world_size)))


PLACES = pytest.mark.parametrize("place", [neighbours, dealt, to_and_fro])


def pretend(hosts):
    transport_of(None).memory.facts[HOSTS] = hosts
    return hosts


def clusters(place):
    """Each way that the ranks of this group pretend to be placed, while it lasts."""
    world_size = dist.get_world_size()
    for count in COUNTS[world_size]:
        yield pretend(place(world_size, count))
