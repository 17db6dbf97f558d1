"""Differences: both sides keep the same rows, wherever they are, and the receiver follows the sender."""

import sys

import pytest
import torch

import commq
from commq.attach import sample_cache
from commq.attach.crossing import Place, Samples, Turn
from commq.codecs.bounds import error_bound
from commq.collectives.memory import Memory
from interpreted import interpreted

SAMPLES, ROWS, SHAPE = 6, 2, (3, 5)


class Pair:
    """Both sides of a boundary."""

    def __init__(self, way, dtype=torch.float32, device="cpu"):
        self.like = torch.empty(ROWS, *SHAPE, dtype=dtype, device=device)
        places = [Place(0, False, sends, 0, 0, Memory(), "auto") for sends in (True, False)]
        self.sender, self.receiver = (way.crossing(place, self.like) for place in places)

    def cross(self, x, ids, chunk=0, *, told=None):
        """What arrives, and the bytes it took."""
        device = self.like.device
        turn = Turn(0, chunk, None if ids is None else Samples(ids, ids.to(device)))
        wire = torch.empty(self.sender.nbytes(turn), dtype=torch.uint8, device=device)
        assert self.receiver.nbytes(turn) == len(wire)
        self.sender.encode(x.to(device).reshape(-1), wire, turn)
        y = torch.empty_like(self.like)
        turn = turn if told is None else Turn(0, chunk, Samples(told, told.to(device)))
        self.receiver.decode(wire, y.view(-1), turn)
        return y.cpu(), len(wire)

    def same(self):
        kept = self.sender.state_dict(), self.receiver.state_dict()
        return all(torch.equal(kept[0][name], kept[1][name]) for name in ("ids", "rows"))


def way(tmp_path, **changed):
    options = {"samples": SAMPLES, "format": commq.get_format("int4", block=16), **changed}
    if options.get("cache") == "disk":
        options["folder"] = tmp_path / str(len(list(tmp_path.iterdir())))
    return commq.Differences(**options)


def activations(epoch, dtype=torch.float32):
    """A sample's changes little between epochs."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(SAMPLES, *SHAPE, generator=generator)
    change = torch.randn(SAMPLES, *SHAPE, generator=generator.manual_seed(epoch))
    return (base + 0.01 * epoch * change).to(dtype)


@pytest.mark.parametrize("cache", ["device", "host", "disk"])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8", "int4"])
def test_every_cache_gives_the_same_bits_on_both_sides(tmp_path, cache, storage):
    options = {"storage": commq.get_format(storage)}
    pair, plain = Pair(way(tmp_path, cache=cache, **options)), Pair(way(tmp_path, cache="device", **options))
    for epoch in range(3):
        ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for side in (pair.sender, pair.receiver):
            side.prefetch(Samples(ids, ids))
        for chunk in range(SAMPLES // ROWS):
            x = activations(epoch)[ids[chunk * ROWS : (chunk + 1) * ROWS]]
            got, nbytes = pair.cross(x, ids, chunk)
            assert torch.equal(got, plain.cross(x, ids, chunk)[0])
            assert nbytes == 16 + (30 * 2 if epoch == 0 else 16 + 16)
    assert pair.same()


def test_the_receiver_holds_what_it_kept_plus_the_difference(tmp_path):
    """Within the bound of the difference, which is far smaller than the activation."""
    pair, ids = Pair(way(tmp_path, storage=commq.get_format("fp32"))), torch.arange(ROWS)
    held, _ = pair.cross(activations(0)[:ROWS], ids)
    assert torch.equal(held, activations(0)[:ROWS].bfloat16().float())
    for epoch in range(1, 5):
        x = activations(epoch)[:ROWS]
        got, _ = pair.cross(x, ids)
        bound = error_bound((x - held).view(-1), commq.get_format("int4", block=16)) + x.view(-1).abs() * 2.0**-22
        assert bool(((got - x).view(-1).abs() <= bound).all())
        held = got
    direct = commq.decode(commq.encode(x, commq.get_format("int4", block=16)))
    assert float((held - x).norm()) < 0.1 * float((direct - x).norm())


def test_nan_arrives_and_is_not_kept(tmp_path):
    for first in (True, False):
        pair, ids = Pair(way(tmp_path, storage=commq.get_format("fp32"))), torch.arange(ROWS)
        if not first:
            pair.cross(activations(0)[:ROWS], ids)
        x = activations(1)[:ROWS]
        x[0, 1, 2] = torch.nan
        got, _ = pair.cross(x, ids)
        assert bool(got[0, 1, 2].isnan()) and bool(got[1, 1:].isfinite().all())  # in another block
        assert pair.same()
        again, _ = pair.cross(activations(2)[:ROWS], ids)
        assert bool(again.isfinite().all())


KEPT = [(cache, storage, dtype) for cache in ("device", "host") for storage in ("fp32", "bf16", "fp16")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)]  # fmt: skip


def go_alike(pairs):
    """Three epochs, with numbers that are not finite and one that bf16 rounds up to infinity."""
    for epoch in range(3):
        for chunk in range(SAMPLES // ROWS):
            ids = torch.arange(SAMPLES).roll(epoch)
            x = activations(epoch, pairs[0].like.dtype)[ids[chunk * ROWS : (chunk + 1) * ROWS]]
            if epoch == chunk:
                x[0, 1, 2], x[1, 2, 3], x[1, 0, 4] = torch.nan, torch.inf, torch.finfo(x.dtype).max
            one, other = (pair.cross(x, ids, chunk) for pair in pairs)
            assert one[1] == other[1] and torch.equal(one[0].isnan(), other[0].isnan())
            assert torch.equal(one[0].nan_to_num(nan=7.0), other[0].nan_to_num(nan=7.0))
    for name in ("sender", "receiver"):
        one, other = (getattr(pair, name).state_dict() for pair in pairs)
        assert torch.equal(one["ids"], other["ids"]) and torch.equal(one["rows"], other["rows"])


@pytest.fixture
def kernels(monkeypatch):
    """Caches that are made while this is there use interpreted kernels."""
    name = "commq.attach.triton_samples"
    copy = interpreted(name)
    monkeypatch.setitem(sys.modules, name, copy)
    monkeypatch.setattr(sample_cache, "takes_triton", lambda backend, device: True)
    monkeypatch.setattr(copy, "_BLOCK", 8)  # two for a row of 15
    return copy


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about numbers that are not finite
@pytest.mark.parametrize(("cache", "storage", "dtype"), KEPT)
def test_triton_interpreted(tmp_path, monkeypatch, kernels, cache, storage, dtype):
    options = way(tmp_path, cache=cache, storage=commq.get_format(storage))
    fast = Pair(options, dtype)
    monkeypatch.setattr(sample_cache, "takes_triton", lambda backend, device: False)
    go_alike([Pair(options, dtype), fast])


def test_triton_interpreted_makes_rows_of_other_samples_nan(kernels):
    ids, delta, y = torch.tensor([2, 0, 1]), torch.ones(3 * 15), torch.empty(3 * 15)
    rows = torch.zeros(3, 15)
    kernels.advance(None, None, delta, y, torch.tensor([2, 1, 1]), ids, rows, ids)
    assert torch.equal(y.view(3, 15)[:, 0].isnan(), torch.tensor([False, True, False]))
    assert torch.equal(rows[:, 14], torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.gpu
@pytest.mark.parametrize(("cache", "storage", "dtype"), [*KEPT, ("device", "int8", torch.bfloat16)])
def test_on_cuda(tmp_path, cache, storage, dtype):
    options = way(tmp_path, cache=cache, storage=commq.get_format(storage))
    go_alike([Pair(options, dtype), Pair(options, dtype, "cuda")])


def test_samples_without_names_change_nothing(tmp_path):
    pair, ids, x = Pair(way(tmp_path), torch.bfloat16), torch.arange(ROWS), activations(0, torch.bfloat16)[:ROWS]
    pair.cross(x, ids)
    before = pair.sender.state_dict()
    got, nbytes = pair.cross(x, None)
    assert torch.equal(got, x) and nbytes == 30 * 2
    assert torch.equal(before["rows"], pair.sender.state_dict()["rows"]) and pair.same()


def test_a_state_goes_on_to_the_bit(tmp_path):
    ids, going, resumed = torch.arange(ROWS), Pair(way(tmp_path)), Pair(way(tmp_path, cache="device"))
    going.cross(activations(0)[:ROWS], ids)
    resumed.sender.load_state_dict(going.sender.state_dict())
    resumed.receiver.load_state_dict(going.receiver.state_dict())
    one, other = (pair.cross(activations(1)[:ROWS], ids) for pair in (going, resumed))
    assert torch.equal(one[0], other[0]) and one[1] == other[1]


def test_stages_that_name_other_samples_are_told(tmp_path):
    pair = Pair(way(tmp_path))
    with pytest.raises(ValueError, match=r"tensor 0 from stage 0 to stage 1.*samples \[0, 1\] came.*told \[0, 2\]"):
        pair.cross(activations(0)[:ROWS], torch.arange(ROWS), told=torch.tensor([0, 2]))
    for ids in (torch.arange(1), torch.tensor([0, SAMPLES]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="expected 2 with numbers from 0 to 5"):
            pair.cross(activations(0)[:ROWS], ids)


def test_what_cannot_be_is_refused(tmp_path):
    for changed in ({"samples": 0}, {"cache": "tape"}, {"cache": "disk"}, {"format": commq.get_format("bf16")}):
        with pytest.raises(ValueError, match="expected one"):
            commq.Differences(**{"samples": 4, **changed})
    with pytest.raises(ValueError, match="expected samples in rows"):
        way(tmp_path).crossing(Place(0, False, True, 0, 0, Memory(), "auto"), torch.empty(7))
    assert way(tmp_path).cache_bytes(SHAPE) == SAMPLES * 15 * 2


def test_blocks_that_span_tokens_are_said_once(caplog):
    place = Place(0, False, True, 0, 0, Memory(), "auto")
    for way, width, said in (
        (commq.Direct(commq.get_format("int4")), 128, False),
        (commq.Direct(commq.get_format("int4")), 64, True),
        (commq.Direct(commq.get_format("int4", block=64), rotation=commq.Rotation(size=128)), 64, True),
        (commq.Direct(commq.get_format("bf16")), 7, False),
        (commq.Tiles(), 384, False),
        (commq.Tiles(), 96, True),
        (commq.Differences(samples=2, cache="device"), 64, True),
    ):
        caplog.clear()
        way.crossing(place, torch.empty(2, 5, width))
        assert ("encoded together" in caplog.text) == said, (way, width)
