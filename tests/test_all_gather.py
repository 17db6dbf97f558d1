"""all_gather: exact on constants, within its bound, the same bits on all ranks."""

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS
from commq.collectives.arguments import PIECE_BYTES
from harness import process_ranks, rank_generator, run_processes, run_threads, thread_ranks
from numerics import paired
from test_schedules import gather, piece_bytes


@thread_ranks(*range(1, 18))
def test_ones_are_exact():
    world_size = dist.get_world_size()
    for name, numel in paired(FORMATS, (1, 256, 1003), world_size):
        output = torch.empty(world_size, numel)
        commq.all_gather(output, torch.ones(numel), format=name)
        assert bool((output == 1.0).all()), (name, numel)
        outputs = [torch.empty(127) for _ in range(world_size)]
        commq.all_gather(outputs, torch.ones(127), format=name)
        assert all(bool((each == 1.0).all()) for each in outputs), name


@thread_ranks(2, 3, 17)
def test_within_the_bound_and_equal_on_all_ranks():
    for name, fmt in FORMATS.items():
        for numel in (1, 127, 1003):
            x = torch.randn(numel, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
            output = torch.empty(dist.get_world_size(), numel)
            commq.all_gather(output, x, format=name)
            for row, exact in zip(output, gather(x), strict=True):
                assert bool(((row - exact.to(torch.float64)).abs() <= error_bound(exact, fmt)).all()), (name, numel)
            assert all(torch.equal(each, output) for each in gather(output)), name


@thread_ranks(2, 3)
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
def test_pieces_lists_and_place_change_no_bit(options):
    numel, world_size = 20_001, dist.get_world_size()
    x = torch.randn(numel, generator=rank_generator(3))
    outputs = [torch.empty(world_size * numel) for _ in range(5)]
    commq.all_gather(outputs[0], x, **options)
    commq.all_gather(outputs[1], x, backend="reference", **options)
    own = outputs[2].view(world_size, -1)[dist.get_rank()]
    own.copy_(x)
    with piece_bytes(1 << 14):
        commq.all_gather(outputs[2], own, **options)
        commq.all_gather(outputs[3], x, **options)
        commq.all_gather(list(outputs[4].split(numel)), x, **options)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@thread_ranks(1, 2, 3, 8)
def test_uneven_lists():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = [0, 30_000, 1, 777, 128, 0, 5, 1003][:world_size]
    for name in ("int8", "nvfp4", "bf16"):
        for nbytes in (1 << 20, 1 << 12):
            outputs = [torch.empty(n, 1) for n in lengths]
            outputs[-1] = torch.empty(1, 2 * lengths[-1])[:, ::2]  # not contiguous
            with piece_bytes(nbytes):
                commq.all_gather(outputs, torch.full((lengths[rank],), rank + 1.0), format=name)
            assert all(bool((each == w + 1.0).all()) for w, each in enumerate(outputs)), name
    commq.all_gather([torch.empty(0)] * world_size, torch.empty(0), format="int8")
    commq.all_gather(torch.empty(0), torch.empty(0), format="int8")


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_and_strides(dtype):
    x = torch.randn(20, 6, generator=rank_generator(4)).to(dtype).t()  # not contiguous
    flat, strided = torch.empty(360, dtype=dtype), torch.full((360, 2), -1.0, dtype=dtype)
    commq.all_gather(flat, x.contiguous(), format="int4")
    commq.all_gather(strided[:, 0].view(18, 20), x, format="int4")
    assert torch.equal(strided[:, 0], flat) and bool((strided[:, 1] == -1).all())
    wide, narrow = torch.empty(360), torch.empty(360, dtype=torch.bfloat16)
    commq.all_gather(wide, x, format="int4")
    commq.all_gather(narrow, x, format="int4")
    assert torch.equal(wide.to(dtype), flat) and torch.equal(wide.to(torch.bfloat16), narrow)
    scalars = torch.empty(3, dtype=dtype)
    commq.all_gather(scalars, torch.tensor(dist.get_rank() + 1.0, dtype=dtype), format="sign")
    assert scalars.tolist() == [1, 2, 3]


@thread_ranks(3)
def test_what_encoding_would_not_make_smaller_is_exact():
    outputs, x = [torch.empty(n) for n in (30, 1000, 20)], torch.randn(1000, generator=rank_generator(5))
    x = x[: [30, 1000, 20][dist.get_rank()]]
    commq.all_gather(outputs, x, format="int8")
    assert torch.equal(outputs[dist.get_rank()], x) == (dist.get_rank() != 1)


@thread_ranks(3)
def test_not_finite_is_nan_on_all_ranks():
    for value in (float("nan"), float("inf"), -float("inf")):
        x, output = torch.ones(500), torch.empty(3, 500)
        if dist.get_rank() == 1:
            x[130] = value
        commq.all_gather(output, x, format="int4")
        assert bool(output[1, 128:256].isnan().all())
        assert int((output == 1.0).sum()) == 1500 - 128


@thread_ranks(2)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats():
    x, steps = torch.randn(200, generator=rank_generator(6)), 120
    total, output, again = torch.zeros(2, 200), torch.empty(2, 200), torch.empty(2, 200)
    for step in range(steps):
        commq.all_gather(output, x, format="int4", rounding="stochastic", step=step)
        total += output
    commq.all_gather(again, x, format="int4", rounding="stochastic", step=steps - 1)
    assert torch.equal(output, again)
    exact = torch.stack(gather(x))
    deviation = (float(exact.abs().max()) / 7) / 2 / steps**0.5  # a variance of at most step**2 / 4
    assert float((total / steps - exact).abs().max()) < 5 * deviation
    commq.all_gather(output, torch.linspace(-1, 1, 200), format="int4", rounding="stochastic")
    assert not torch.equal(output[0], output[1]), "ranks share their random bits"


@thread_ranks(5)
def test_subgroup():
    group, rank = dist.new_group([1, 3, 4]), dist.get_rank()
    output = torch.full((3, 200), -1.0)
    if rank in (1, 3, 4):
        commq.all_gather(output, torch.full((200,), float(rank)), format="int4", group=group)
    assert output[:, 7].tolist() == ([1, 3, 4] if rank in (1, 3, 4) else [-1, -1, -1])


def gather_all_formats():
    outputs = []
    for name in FORMATS:
        outputs.append(torch.empty(3, 1003))
        commq.all_gather(outputs[-1], torch.randn(1003, generator=rank_generator(7)), format=name)
    return torch.stack(outputs)


def test_processes_give_the_same_bits_as_threads():
    for threads, processes in zip(
        run_threads(gather_all_formats, 3), run_processes(gather_all_formats, 3), strict=True
    ):
        assert torch.equal(threads, processes)


@process_ranks(2)
def test_async_in_pieces():
    PIECE_BYTES["cpu"] = 1 << 14
    rank = dist.get_rank()
    outputs = [torch.empty(60_000), [torch.empty(n) for n in (20_000, 3)], torch.empty(50, 2).t()]
    inputs = [torch.full((n,), rank + 1.0) for n in (30_000, (20_000, 3)[rank], 50)]
    works = [commq.all_gather(y, x, format="int8", async_op=True) for y, x in zip(outputs, inputs, strict=True)]
    assert not works[0].is_completed() and works[0].get_future().wait()[0] is outputs[0]
    for work in works:
        assert work.wait() and work.wait() and work.is_completed()
    for rows in (outputs[0].split(30_000), outputs[1], outputs[2].reshape(2, 50)):
        assert [bool((row == w + 1.0).all()) for w, row in enumerate(rows)] == [True, True]


@thread_ranks(1)
def test_one_rank_copies():
    x, output = torch.randn(1000), torch.empty(1000)
    commq.all_gather(output, x, format="sign")
    assert torch.equal(output, x)
    x[3] = 7.0
    assert commq.all_gather([output], x, format="sign", async_op=True).wait() and torch.equal(output, x)


@thread_ranks(2)
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda y, x: commq.all_gather(y[:7], x, format="int8"), ValueError, "has 7 elements, expected 8"),
        (lambda y, x: commq.all_gather([y], x, format="int8"), ValueError, "list of 1 outputs, expected one for"),
        (lambda y, x: commq.all_gather([x, x], y[:3], format="int8"), ValueError, "has 3 .*expected 4"),
        (lambda y, x: commq.all_gather(y, x.int(), format="int8"), TypeError, "expected float32, bfloat16"),
        (lambda y, x: commq.all_gather(y, x.to("meta"), format="int8"), ValueError, "expected one device"),
        (lambda y, x: commq.all_gather(y, y[2:6], format="int8"), ValueError, "share memory"),
        (lambda y, x: commq.all_gather(x[:1].expand(8), x, format="int8"), ValueError, "share memory"),
        (lambda y, x: commq.all_gather(y, x, format="fp32", rounding="stochastic"), ValueError, "fp32 loses nothing"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.ones(8), torch.ones(4))
