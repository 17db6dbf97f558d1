"""all_to_all: exact on constants and on the own split, within its bound, splits of any lengths."""

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.transport import C10d
from harness import process_ranks, rank_generator, run_processes, run_threads, thread_ranks
from numerics import paired
from test_schedules import gather, piece_bytes


def columns(x_WS):
    """What this rank is sent: row w is rank w's row for it."""
    return torch.stack(gather(x_WS))[:, dist.get_rank()]


@thread_ranks(*range(1, 18))
def test_ones_are_exact():
    world_size = dist.get_world_size()
    for name, numel in paired(FORMATS, (1, 256, 1003), world_size):
        output = torch.empty(world_size * numel)
        commq.all_to_all(output, torch.ones(world_size * numel), format=name)
        assert bool((output == 1.0).all()), (name, numel)


@thread_ranks(2, 3, 17)
def test_within_the_bound_and_exact_where_nothing_is_sent():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, fmt in FORMATS.items():
        for numel in (1, 127, 256, 1003):
            x = torch.randn(world_size, numel, generator=rank_generator(1)) * 10.0 ** (rank % 4 - 2)
            output = torch.empty_like(x)
            commq.all_to_all(output, x, format=name)
            assert torch.equal(output[rank], x[rank])
            for row, exact in zip(output, columns(x), strict=True):
                assert bool(((row - exact.to(torch.float64)).abs() <= error_bound(exact, fmt)).all()), (name, numel)


@thread_ranks(2, 3)
@pytest.mark.parametrize("numel", [20_480, 20_001])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int4"},
        {"format": "sign"},
        {"format": "int4", "rounding": "stochastic", "seed": 3, "step": 7},
        {"format": "nvfp4", "rotation": commq.Rotation(size=64, signs=True), "rounding": "stochastic"},
        {"format": "bf16", "rounding": "stochastic"},
    ],
    ids=str,
)
def test_pieces_and_splits_change_no_bit(options, numel):
    world_size = dist.get_world_size()
    x = torch.randn(world_size * numel, generator=rank_generator(3))
    outputs = [torch.empty_like(x) for _ in range(4)]
    commq.all_to_all(outputs[0], x, **options)
    commq.all_to_all(outputs[1], x, backend="reference", **options)
    commq.all_to_all(outputs[2], x, [numel] * world_size, [numel] * world_size, **options)
    with piece_bytes(1 << 14):
        commq.all_to_all(outputs[3], x, **options)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@thread_ranks(1, 2, 3, 5, 8)
@pytest.mark.parametrize("options", [{"format": "int4"}, {"format": "bf16", "rounding": "stochastic"}], ids=str)
def test_uneven_splits(options):
    """Rank a sends (7 a + 5 b) % 9 * 40 rows to rank b: zero, raw and encoded splits of every parity."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = [[(7 * a + 5 * b) % 9 * 40 + (a + b) % 2 for b in range(world_size)] for a in range(world_size)]
    sent, received = rows[rank], [rows[a][rank] for a in range(world_size)]
    x = torch.cat([torch.full((n, 3), 1.0 + rank + 16 * b) for b, n in enumerate(sent)])
    output = torch.empty(sum(received), 3)
    commq.all_to_all(output, x, received, sent, **options)
    for a, part in enumerate(output.split(received)):
        assert bool((part == 1.0 + a + 16 * rank).all())
    nothing = torch.empty(0, 3)
    commq.all_to_all(nothing, nothing.clone(), [0] * world_size, [0] * world_size, **options)
    commq.all_to_all(nothing, nothing.clone(), **options)


@thread_ranks(3)
def test_one_list_of_splits_and_ranks_that_send_nothing():
    rank = dist.get_rank()
    x = torch.full((600 if rank == 0 else 0,), 2.0)  # a scatter
    output = torch.empty(200)
    commq.all_to_all(output, x, [200, 0, 0], [200] * 3 if rank == 0 else [0] * 3, format="int8")
    assert bool((output == 2.0).all())
    x, output = torch.full((3, 5), rank + 1.0), torch.empty(3, 5)
    commq.all_to_all(output, x, None, [1, 1, 1], format="int8")
    assert output[:, 0].tolist() == [1, 2, 3]


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_and_strides(dtype):
    x = torch.randn(20, 60, generator=rank_generator(4)).to(dtype).t()  # not contiguous
    plain, strided = torch.empty(60, 20, dtype=dtype), torch.full((60, 20, 2), -1.0, dtype=dtype)
    commq.all_to_all(plain, x.contiguous(), format="int4")
    commq.all_to_all(strided[..., 0], x, format="int4")
    assert torch.equal(strided[..., 0], plain) and bool((strided[..., 1] == -1).all())
    wide, narrow = torch.empty(60, 20), torch.empty(60, 20, dtype=torch.bfloat16)
    commq.all_to_all(wide, x, format="int4")
    commq.all_to_all(narrow, x, format="int4")
    assert torch.equal(wide.to(dtype), plain) and torch.equal(wide.to(torch.bfloat16), narrow)


@thread_ranks(3)
def test_not_finite_is_nan_in_its_block():
    for value in (float("nan"), float("inf"), -float("inf")):
        x, output = torch.ones(3, 500), torch.empty(3, 500)
        if dist.get_rank() == 1:
            x[2, 130] = value
        commq.all_to_all(output, x, format="int4")
        assert bool(output[1, 128:256].isnan().all()) == (dist.get_rank() == 2)
        assert int((output == 1.0).sum()) == 1500 - 128 * (dist.get_rank() == 2)


@thread_ranks(3)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats():
    x, steps = torch.randn(3, 200, generator=rank_generator(6)), 120
    total, output, again = torch.zeros(3, 200), torch.empty(3, 200), torch.empty(3, 200)
    for step in range(steps):
        commq.all_to_all(output, x, format="int4", rounding="stochastic", step=step)
        total += output
    commq.all_to_all(again, x, format="int4", rounding="stochastic", step=steps - 1)
    assert torch.equal(output, again)
    exact = columns(x)
    deviation = (float(exact.abs().max()) / 7) / 2 / steps**0.5  # a variance of at most step**2 / 4
    assert float((total / steps - exact).abs().max()) < 5 * deviation


def exchange_odd_splits():
    x, output = torch.ones(4 * 1003, dtype=torch.bfloat16), torch.empty(4 * 1003, dtype=torch.bfloat16)
    commq.all_to_all(output, x, format="int8")
    commq.all_to_all(output, x, [1003] * 4, [1003] * 4, format="int8")


def test_the_own_split_never_crosses_the_wire(monkeypatch):
    """Not a byte for the rank itself, unless one call encodes all splits; never more bytes than raw."""
    moves, move = [], C10d.all_to_all_v

    def record(self, send, recv, send_splits, recv_splits):
        moves.append((self.rank, send_splits, recv_splits))
        return move(self, send, recv, send_splits, recv_splits)

    monkeypatch.setattr(C10d, "all_to_all_v", record)
    run_threads(exchange_odd_splits, 4)
    assert len(moves) == 2 * 4
    for rank, sent, received in moves:
        assert sent[rank] == received[rank] == 0
        assert all(0 < nbytes < 2 * 1003 for w, nbytes in enumerate(sent) if w != rank)


@thread_ranks(5)
def test_subgroup():
    group, rank = dist.new_group([1, 3, 4]), dist.get_rank()
    output = torch.full((3, 200), -1.0)
    if rank in (1, 3, 4):
        commq.all_to_all(output, torch.full((3, 200), float(rank)), format="int4", group=group)
    assert output[:, 7].tolist() == ([1, 3, 4] if rank in (1, 3, 4) else [-1, -1, -1])


def exchange_all_formats():
    outputs = []
    for name in FORMATS:
        x = torch.randn(1800, generator=rank_generator(7))
        splits = [[0, 1003, 797], [1003, 700, 97], [797, 97, 906]][dist.get_rank()]
        outputs.append(torch.empty(3, 600))
        commq.all_to_all(outputs[-1], x.view(3, 600), format=name)
        outputs.append(torch.empty(1800))
        commq.all_to_all(outputs[-1], x, splits, splits, format=name)
    return torch.cat([each.view(-1) for each in outputs])


def test_processes_give_the_same_bits_as_threads():
    for threads, processes in zip(
        run_threads(exchange_all_formats, 3), run_processes(exchange_all_formats, 3), strict=True
    ):
        assert torch.equal(threads, processes)


@process_ranks(2)
def test_async_in_pieces():
    PIECE_BYTES["cpu"] = 1 << 14
    rank = dist.get_rank()
    outputs = [torch.empty(60_000), torch.empty(50, 2).t(), torch.empty(1000)]
    inputs = [torch.full((60_000,), rank + 1.0), torch.full((2, 50), rank + 1.0), torch.full((1000,), rank + 1.0)]
    splits = [(), (), ([500, 500], [500, 500])]
    works = [
        commq.all_to_all(y, x, *lengths, format="int8", async_op=True)
        for y, x, lengths in zip(outputs, inputs, splits, strict=True)
    ]
    assert not works[0].is_completed() and works[0].get_future().wait()[0] is outputs[0]
    for work, output in zip(works, outputs, strict=True):
        assert work.wait() and work.wait() and work.is_completed()
        assert [bool((row == w + 1.0).all()) for w, row in enumerate(output.reshape(2, -1))] == [True, True]


@thread_ranks(1)
def test_one_rank_copies():
    x, output = torch.randn(1000), torch.empty(1000)
    commq.all_to_all(output, x, format="sign")
    assert torch.equal(output, x)
    x[3] = 7.0
    assert commq.all_to_all(output, x, [1000], [1000], format="sign", async_op=True).wait() and torch.equal(output, x)


@thread_ranks(2)
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda y, x: commq.all_to_all(y, x[:7], format="int8"), ValueError, "7 rows, expected a multiple of 2"),
        (lambda y, x: commq.all_to_all(y, x[:6], format="int8"), ValueError, "itself 3 elements and expects 4"),
        (lambda y, x: commq.all_to_all(y, x, [4, 4], [3, 4], format="int8"), ValueError, "sum 8"),
        (lambda y, x: commq.all_to_all(y, x, [8], [4, 4], format="int8"), ValueError, "expected 2 lengths"),
        (lambda y, x: commq.all_to_all(y, x, [9, -1], [4, 4], format="int8"), ValueError, "output_split_sizes"),
        (lambda y, x: commq.all_to_all(y.view(4, 2), x, format="int8"), ValueError, "same number of elements for each"),
        (lambda y, x: commq.all_to_all(y, x.int(), format="int8"), TypeError, "expected float32, bfloat16"),
        (lambda y, x: commq.all_to_all(y, x.to("meta"), format="int8"), ValueError, "expected one device"),
        (lambda y, x: commq.all_to_all(x, x, format="int8"), ValueError, "share memory"),
        (lambda y, x: commq.all_to_all(y, x, format="bf16", rotation=32), ValueError, "drop the rotation"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.ones(8), torch.ones(8))
