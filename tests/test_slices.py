"""Slices of long rows: together the row, none too long, where all ranks cut; and who cuts at all."""

import pytest
import torch

from commq.collectives import slices
from commq.collectives.hosts import HOSTS, Hosts
from commq.collectives.rehearsal import Rehearsal
from commq.collectives.transport import C10d
from harness import thread_ranks


@pytest.mark.parametrize("longest", [1, 15, 17, 4095, 4096, 4097, 8192, 8193, 70_001])
def test_slices_make_up_every_row(longest, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 4096)
    cuts = list(slices.slices(longest))
    assert len(cuts) == -(-longest // 4096)
    for nbytes in {0, 1, longest // 2, longest}:
        row = torch.arange(nbytes)
        parts = [row[cut] for cut in cuts]
        assert torch.equal(torch.cat(parts), row)
        assert max(map(len, parts)) <= 4096
    assert all(cut.start % 16 == 0 for cut in cuts)


@thread_ranks(3)
def test_who_cuts(monkeypatch):
    """Only between hosts, and only where some rank's NCCL has no RDMA."""
    transport = C10d()
    facts = transport.memory.facts
    for hosts, rdma, expected in (
        ((0, 0, 0), (False, False, False), False),
        ((0, 1, 2), (True, True, True), False),
        ((0, 1, 2), (True, False, True), True),
        ((0, 0, 1), (False, False, False), True),
    ):
        facts.clear()
        facts[HOSTS] = Hosts(hosts)
        own = Rehearsal(transport)
        own.share = lambda value, rdma=rdma: [not each for each in rdma]
        assert slices.over_tcp(own) is expected
        assert not slices.are_cut(torch.zeros(1), 1 << 30, own)  # on a CPU gloo has its own ways


@pytest.mark.parametrize(
    ("variables", "expected"), [({"NCCL_IB_DISABLE": "1"}, False), ({"NCCL_NET": "Socket"}, False), ({}, True)]
)
def test_rdma_is_found(variables, expected, monkeypatch, tmp_path):
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(slices, "DEVICES", tmp_path)
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    monkeypatch.delenv("NCCL_NET", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slices.has_rdma() is expected
    monkeypatch.setattr(slices, "DEVICES", tmp_path / "none")
    assert not slices.has_rdma()
