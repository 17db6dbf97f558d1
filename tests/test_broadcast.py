"""broadcast, send and recv: exact on constants, within their bound, the same bits on both sides."""

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

OPTIONS = [
    {"format": "int4"},
    {"format": "int4", "rounding": "stochastic", "seed": 3, "step": 7},
    {"format": "nvfp4", "rotation": commq.Rotation(size=64, signs=True), "rounding": "stochastic"},
    {"format": "bf16", "rounding": "stochastic"},
]


@thread_ranks(*range(1, 18))
def test_ones_are_exact():
    for src in {0, dist.get_world_size() - 1}:
        for name, numel in paired(FORMATS, (1, 127, 1003), dist.get_world_size()):
            tensor = torch.full((numel,), float(dist.get_rank() == src))
            commq.broadcast(tensor, src, format=name)
            assert bool((tensor == 1.0).all()), (name, numel)


@thread_ranks(2, 3, 17)
def test_within_the_bound_and_equal_on_all_ranks():
    for name, fmt in FORMATS.items():
        for numel in (1, 127, 1003):
            x = torch.randn(numel, generator=rank_generator(1)) * 10.0 ** (dist.get_rank() % 4 - 2)
            exact, result = gather(x)[1], x.clone()
            commq.broadcast(result, 1, format=name)
            assert bool(((result - exact.to(torch.float64)).abs() <= error_bound(exact, fmt)).all()), (name, numel)
            assert all(torch.equal(each, result) for each in gather(result)), name


@thread_ranks(2, 3)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pieces_change_no_bit(options):
    x = torch.randn(70_001, generator=rank_generator(2))
    whole, cut, slow = x.clone(), x.clone(), x.clone()
    commq.broadcast(whole, 1, **options)
    commq.broadcast(slow, 1, backend="reference", **options)
    with piece_bytes(1 << 14):
        commq.broadcast(cut, 1, **options)
    assert torch.equal(whole, cut) and torch.equal(whole, slow)


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_and_strides(dtype):
    base = torch.full((6, 50, 2), dist.get_rank() + 1.0, dtype=dtype)
    commq.broadcast(base[..., 0].t(), 2, format="int8")
    assert bool((base[..., 0] == 3).all()) and bool((base[..., 1] == dist.get_rank() + 1).all())
    commq.broadcast(torch.empty(0, dtype=dtype), 0, format="int8")
    scalar = torch.tensor(dist.get_rank() + 1.0, dtype=dtype)
    commq.broadcast(scalar, 1, format="int4")
    assert float(scalar) == 2.0


@thread_ranks(3)
def test_not_finite_is_nan_on_all_ranks():
    for value in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.ones(1000)
        if dist.get_rank() == 1:
            tensor[130] = value
        commq.broadcast(tensor, 1, format="int4")
        assert bool(tensor[128:256].isnan().all()) and int((tensor == 1.0).sum()) == 1000 - 128


@thread_ranks(2)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats():
    x, steps = torch.randn(200, generator=torch.Generator().manual_seed(6)), 120
    total = torch.zeros(200)
    for step in range(steps):
        output, again = x.clone(), x.clone()
        commq.broadcast(output, 0, format="int4", rounding="stochastic", step=step)
        total += output
    commq.broadcast(again, 0, format="int4", rounding="stochastic", step=steps - 1)
    assert torch.equal(output, again)
    deviation = (float(x.abs().max()) / 7) / 2 / steps**0.5  # a variance of at most step**2 / 4
    assert float((total / steps - x).abs().max()) < 5 * deviation


@thread_ranks(5)
def test_subgroup_counts_its_own_ranks():
    group, rank = dist.new_group([1, 3, 4]), dist.get_rank()
    tensor = torch.full((500,), float(rank))
    if rank in (1, 3, 4):
        commq.broadcast(tensor, 2, format="int4", group=group)
    assert bool((tensor == (4.0 if rank in (1, 3, 4) else rank)).all())


@thread_ranks(1)
def test_one_rank_keeps_its_tensor():
    x = torch.randn(1000)
    tensor = x.clone()
    assert commq.broadcast(tensor, 0, format="sign", async_op=True).wait() and torch.equal(tensor, x)


def broadcast_all_formats():
    results = []
    for name in FORMATS:
        results.append(torch.randn(1003, generator=rank_generator(7)))
        commq.broadcast(results[-1], 2, format=name)
    return torch.stack(results)


def test_processes_give_the_same_bits_as_threads():
    for threads, processes in zip(
        run_threads(broadcast_all_formats, 3), run_processes(broadcast_all_formats, 3), strict=True
    ):
        assert torch.equal(threads, processes)


@process_ranks(3)
def test_async_broadcasts_in_pieces():
    PIECE_BYTES["cpu"] = 1 << 14
    tensors = [torch.full((30_000,), dist.get_rank() + 1.0), torch.full((50, 2), dist.get_rank() + 1.0).t()]
    works = [commq.broadcast(t, src, format="int8", async_op=True) for src, t in enumerate(tensors)]
    assert not works[0].is_completed() and works[0].get_future().wait()[0] is tensors[0]
    for src, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
        assert work.wait() and work.wait() and work.is_completed() and bool((tensor == src + 1.0).all())


# Point to point: thread ranks have none.


@process_ranks(2)
def test_send_and_recv_have_the_bits_of_a_broadcast():
    rank = dist.get_rank()
    cases = [{"format": name} for name in FORMATS] + OPTIONS
    for numel in (1, 127, 1003, 70_001):
        for nbytes in (4 << 20, 1 << 14) if numel > 10_000 else (4 << 20,):
            PIECE_BYTES["cpu"] = nbytes
            for options in cases:
                x = torch.randn(numel, generator=rank_generator(8))
                expected, exact = x.clone(), x.clone()
                commq.broadcast(expected, 1, **options)
                if rank == 1:
                    commq.send(x, 0, **options)
                    assert torch.equal(x, exact), "send changed its tensor"
                else:
                    commq.recv(x, 1, **options)
                    assert torch.equal(x, expected), options


@process_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_send_and_recv_dtypes_and_strides(dtype):
    tensor = torch.full((6, 50, 2), dist.get_rank() + 1.0, dtype=dtype)
    for each in (tensor[..., 0].t(), torch.empty(0, dtype=dtype), torch.tensor(3.0, dtype=dtype)):
        if dist.get_rank() == 0:
            commq.send(each, 1, format="int8")
        else:
            commq.recv(each, 0, format="int8")
    assert bool((tensor[..., 0] == 1).all()) and bool((tensor[..., 1] == dist.get_rank() + 1).all())
    assert float(each) == 3.0


@process_ranks(3)
def test_neighbours_send_and_receive_at_once():
    """Twenty pieces each way: every rank waits for its sends first, and nobody waits for ever."""
    PIECE_BYTES["cpu"] = 1 << 14
    rank, numel = dist.get_rank(), 80_000
    x, left, right = torch.full((numel,), rank + 1.0), torch.empty(numel), torch.empty(numel)
    before, after = (rank - 1) % 3, (rank + 1) % 3
    works = [commq.send(x, dst, format="int4", async_op=True) for dst in (before, after)]
    works += [commq.recv(left, before, format="int4", async_op=True)]
    works += [commq.recv(right, after, format="int4", async_op=True)]
    assert all(work.wait() and work.wait() and work.is_completed() for work in works)
    assert bool((left == before + 1).all()) and bool((right == after + 1).all())


@process_ranks(3)
def test_point_to_point_in_a_subgroup():
    group, rank = dist.new_group([0, 2]), dist.get_rank()
    tensor = torch.full((1000,), rank + 1.0)
    if rank == 0:
        commq.send(tensor, 1, format="int8", group=group)
    if rank == 2:
        commq.recv(tensor, 0, format="int8", group=group)
    assert bool((tensor == [1, 2, 1][rank]).all())


@thread_ranks(2)
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: commq.broadcast(t, 2, format="int8"), ValueError, "src=2, expected a rank in the group, 0 to 1"),
        (lambda t: commq.broadcast(t, -1, format="int8"), ValueError, "src=-1, expected"),
        (lambda t: commq.broadcast(t.int(), 0, format="int8"), TypeError, "expected float32, bfloat16"),
        (lambda t: commq.broadcast(t[:1].expand(4), 0, format="int8"), ValueError, "share memory"),
        (lambda t: commq.send(t, 2, format="int8"), ValueError, "dst=2, expected a rank in the group, 0 to 1"),
        (lambda t: commq.send(t, dist.get_rank(), format="int8"), ValueError, "is this rank itself"),
        (lambda t: commq.send(t.long(), 0, format="int8"), TypeError, "expected float32, bfloat16"),
        (lambda t: commq.recv(t, dist.get_rank(), format="int8"), ValueError, "is this rank itself"),
        (lambda t: commq.recv(t, 0, format="int9"), ValueError, "'int9' is unknown"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.ones(4))
