"""Slices of long rows: together the row, none too long, where all ranks cut; and who cuts at all."""

from types import SimpleNamespace

import pytest
import torch

from commq.collectives import link, slices
from commq.collectives.hosts import HOSTS, Hosts
from commq.collectives.link import Curve
from commq.collectives.memory import Memory

TCP, RDMA = True, False


@pytest.mark.parametrize("longest", [1, 15, 17, 4095, 4096, 4097, 8192, 8193, 70_001])
def test_slices_make_up_every_row(longest):
    cuts = list(slices.slices(longest, 4096))
    assert len(cuts) == -(-longest // 4096)
    for nbytes in {0, 1, longest // 2, longest}:
        row = torch.arange(nbytes)
        parts = [row[cut] for cut in cuts]
        assert torch.equal(torch.cat(parts), row)
        assert max(map(len, parts)) <= 4096
    assert all(cut.start % 16 == 0 for cut in cuts)


def group(host_of, links):
    """A group whose ranks have told each other what their links are."""
    memory = Memory()
    memory.facts[HOSTS] = Hosts(host_of)
    return SimpleNamespace(world_size=len(host_of), memory=memory, share=lambda own: list(links))


@pytest.mark.parametrize(
    ("host_of", "links", "expected"),
    [
        ((0, 0, 0), (TCP, TCP, TCP), False),
        ((0, 1, 2), (RDMA, RDMA, RDMA), False),
        ((0, 1, 2), (RDMA, TCP, RDMA), True),
        ((0, 0, 1), (TCP, TCP, TCP), True),
    ],
)
def test_only_tcp_between_hosts_is_cut(host_of, links, expected):
    assert slices.over_tcp(group(host_of, links)) is expected


@pytest.mark.parametrize(
    ("bytes_per_second", "expected"),
    [(125_000_000, 250_000), (1_250_000_000, 2_500_000), (10**12, 100_000_000), (1000, slices.FEWEST_BYTES)],
)
def test_slices_take_as_long_on_every_link(bytes_per_second, expected, monkeypatch):
    """1 Gbit/s, 10 Gbit/s, faster than rows are long, and all but dead; four ranks."""
    curve = Curve(((0, 7_000), (10**9, 7_000 + 10**18 // bytes_per_second)))
    rows = SimpleNamespace(is_cuda=True, device="cuda")
    transport = group((0, 1, 2, 3), (TCP,) * 4)
    asked = []

    def moves(transport, device):
        asked.append(slices.slice_bytes(rows, 1 << 20, transport))  # measuring must not ask for measurements
        return curve

    monkeypatch.setattr(link, "moves", moves)
    longest = 100_000_000
    found = slices.slice_bytes(rows, longest, transport)
    assert expected - 16 <= found <= expected
    assert found == slices.slice_bytes(rows, longest, transport) and asked == [1 << 20]
    assert slices.slice_bytes(rows, 100, transport) == 100
    assert slices.slice_bytes(torch.zeros(1), longest, transport) == longest  # gloo has its own ways


def test_a_measurement_that_fails_is_made_again(monkeypatch):
    rows = SimpleNamespace(is_cuda=True, device="cuda")
    transport = group((0, 1), (TCP, TCP))

    def fails(transport, device):
        raise RuntimeError("a rank is lost")

    monkeypatch.setattr(link, "moves", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost"):
            slices.slice_bytes(rows, 1 << 20, transport)


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
