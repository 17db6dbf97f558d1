"""Hosts: which ranks of a group share a machine. Found once for a group, and integers from then on."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commq.collectives.transport import Transport

HOSTS = "hosts"
"""Where a group's memory keeps its Hosts. Put other ones there before the first exchange, and they are believed."""


@dataclass(frozen=True)
class Hosts:
    """The host of every rank. Ranks of a host need not be neighbours."""

    host_of: tuple[int, ...]
    """Number of each rank's host: 0, 1, 2, ... without gaps."""

    def __post_init__(self) -> None:
        if sorted(set(self.host_of)) != list(range(self.count)):
            raise ValueError(f"host_of={self.host_of}: expected all numbers from 0 to {max(self.host_of, default=0)}")

    @classmethod
    def of(cls, keys: Sequence[Hashable]) -> Hosts:
        """Ranks with equal keys share a host; hosts are numbered in the order of their first ranks."""
        number = {key: host for host, key in enumerate(dict.fromkeys(keys))}
        return cls(tuple(number[key] for key in keys))

    @property
    def count(self) -> int:
        """Number of hosts (n)."""
        return len(set(self.host_of))

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """members[h][j]: the rank that is number j on host h. Ascending."""
        return tuple(tuple(rank for rank, of in enumerate(self.host_of) if of == host) for host in range(self.count))

    @cached_property
    def local_of(self) -> tuple[int, ...]:
        """Number of each rank on its own host (j)."""
        return tuple(self.members[host].index(rank) for rank, host in enumerate(self.host_of))

    @property
    def ranks_per_host(self) -> int | None:
        """Ranks of every host (l), or None if hosts have different numbers of them."""
        sizes = {len(ranks) for ranks in self.members}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def has_two_levels(self) -> bool:
        """There are several hosts, of several ranks each, as many on every one."""
        return self.count > 1 and (self.ranks_per_host or 1) > 1


def find_hosts(transport: Transport) -> Hosts:
    """The hosts of a group: from its memory, else the ranks tell each other, which blocks and which all do together."""
    facts = transport.memory.facts
    if HOSTS not in facts:
        facts[HOSTS] = Hosts.of(transport.share(host_key()))
    hosts: Hosts = facts[HOSTS]
    return hosts


def host_key() -> str:
    """What ranks of one host have in common: the machine's name, its boot and the network namespace.

    Containers with networks of their own are hosts of their own. NCCL_HOSTID is not asked: it is set to different
    values where ranks of one host share a GPU.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)
