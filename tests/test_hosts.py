"""Hosts: integers that say which ranks share a machine."""

import pytest

from commq.collectives.hosts import Hosts, host_key
from placements import COUNTS, PLACES


def test_hosts_are_numbered_by_their_first_ranks():
    hosts = Hosts.of(["b", "a", "b", "c", "a", "c"])
    assert hosts.host_of == (0, 1, 0, 2, 1, 2) and hosts.count == 3 and hosts.ranks_per_host == 2
    assert hosts.members == ((0, 2), (1, 4), (3, 5))
    assert hosts.local_of == (0, 0, 1, 0, 1, 1)
    assert Hosts((0, 0, 1)).ranks_per_host is None
    with pytest.raises(ValueError, match="expected all numbers from 0 to 2"):
        Hosts((0, 2))


@PLACES
def test_every_rank_has_one_place(place):
    for world_size, counts in COUNTS.items():
        for count in (1, *counts, world_size):
            hosts = place(world_size, count)
            assert hosts.count == count and hosts.ranks_per_host == world_size // count
            assert sorted(rank for ranks in hosts.members for rank in ranks) == list(range(world_size))
            for rank in range(world_size):
                assert hosts.members[hosts.host_of[rank]][hosts.local_of[rank]] == rank


def test_ranks_of_a_host_have_one_key(monkeypatch):
    monkeypatch.setenv("NCCL_HOSTID", "0")  # as where ranks share a GPU
    key = host_key()
    monkeypatch.setenv("NCCL_HOSTID", "1")
    assert host_key() == key
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert host_key() != key
