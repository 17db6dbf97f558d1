"""reduce_scatter: exact on constants, within its bound, and the first half of the all-reduce."""

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS
from commq.codecs.rotation import rotate
from commq.collectives.arguments import PIECE_BYTES
from harness import process_ranks, rank_generator, run_processes, run_threads, thread_ranks
from numerics import paired
from test_schedules import gather, piece_bytes

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG


@thread_ranks(*range(1, 18))
def test_ones_are_exact():
    world_size = dist.get_world_size()
    for name, numel in paired(FORMATS, (1, 256, 1003), world_size):
        output = torch.empty(numel)
        commq.reduce_scatter(output, torch.ones(world_size * numel), AVG, format=name)
        assert bool((output == 1.0).all()), (name, numel)
        output = torch.empty(1003)
        commq.reduce_scatter(output, [torch.ones(1003)] * world_size, format=name)
        assert bool((output == world_size).all()), name


@thread_ranks(2, 3, 17)
def test_within_the_bound():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, fmt in FORMATS.items():
        for numel in (1, 127, 1003):
            x = torch.randn(world_size, numel, generator=rank_generator(1)) * 10.0 ** (rank % 4 - 2)
            output = torch.empty(numel)
            commq.reduce_scatter(output, x, AVG, format=name)
            parts = torch.stack(gather(x))[:, rank]
            bound = torch.stack([error_bound(part, fmt) for part in parts]).mean(dim=0)
            error = (output - parts.to(torch.float64).mean(dim=0)).abs()
            assert bool((error <= bound + 2.0**-22 * parts.abs().sum(dim=0)).all()), (name, numel)


@thread_ranks(2, 3, 8)
def test_followed_by_all_gather_it_is_the_two_shot_all_reduce():
    world_size = dist.get_world_size()
    for name in FORMATS:
        x = torch.randn(world_size * 512, generator=rank_generator(2))
        part, gathered, reduced = torch.empty(512), torch.empty_like(x), x.clone()
        commq.reduce_scatter(part, x, AVG, format=name)
        commq.all_gather(gathered, part, format=name)
        commq.all_reduce(reduced, AVG, format=name, schedule="two_shot")
        assert torch.equal(gathered, reduced), name
    for name in FORMATS:
        commq.reduce_scatter(part, x, format=name)
        commq.all_gather(gathered, part, format="fp32")
        reduced = x.clone()
        commq.all_reduce(reduced, format=name, answer="fp32", schedule="two_shot")
        assert torch.equal(gathered, reduced), name


OPTIONS = [
    {"format": "int4"},
    {"format": "sign"},
    {"format": "int4", "rounding": "stochastic", "seed": 3, "step": 7},
    {"format": "nvfp4", "rotation": commq.Rotation(size=64, signs=True), "rounding": "stochastic"},
    {"format": "bf16", "rounding": "stochastic"},
]


@thread_ranks(2, 3)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pieces_and_lists_change_no_bit(options):
    numel, world_size = 20_001, dist.get_world_size()
    x = torch.randn(world_size * numel, generator=rank_generator(3))
    outputs = [torch.empty(numel) for _ in range(4)]
    lost = [torch.zeros(x.numel()) for _ in range(2)]
    commq.reduce_scatter(outputs[0], x, AVG, residual=lost[0], **options)
    with piece_bytes(1 << 14):
        commq.reduce_scatter(outputs[1], x, AVG, residual=lost[1], **options)
        commq.reduce_scatter(outputs[2], list(x.split(numel)), AVG, **options)
    commq.reduce_scatter(outputs[3], x, AVG, backend="reference", **options)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert torch.equal(*lost)
    with piece_bytes(1 << 14):  # in place
        commq.reduce_scatter(x.view(world_size, -1)[dist.get_rank()], x, AVG, **options)
    assert torch.equal(x.view(world_size, -1)[dist.get_rank()], outputs[0])


@thread_ranks(1, 2, 3, 8)
def test_uneven_lists():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = [0, 30_000, 1, 777, 128, 0, 5, 1003][:world_size]
    for name in ("int8", "mxfp4", "bf16"):
        for nbytes in (1 << 20, 1 << 12):
            inputs = [torch.full((n, 1), float(rank + 1)) for n in lengths]
            output = torch.empty(lengths[rank])
            with piece_bytes(nbytes):
                commq.reduce_scatter(output, inputs, format=name)
            exact = float(sum(range(1, world_size + 1)))
            one = torch.arange(1.0, world_size + 1)
            bound = sum(float(error_bound(v.view(1), FORMATS[name])) for v in one) if name == "mxfp4" else 0.0
            assert bool(((output - exact).abs() <= bound).all()), name
    commq.reduce_scatter(torch.empty(0), [torch.empty(0)] * world_size, format="int8")


@thread_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_and_strides(dtype):
    rank = dist.get_rank()
    x = torch.randn(50, 6, generator=rank_generator(4)).to(dtype).t()  # not contiguous
    flat, strided = torch.empty(100, dtype=dtype), torch.full((100, 2), -1.0, dtype=dtype)
    commq.reduce_scatter(flat, x.contiguous(), format="int4")
    commq.reduce_scatter(strided[:, 0].view(4, 25), x, format="int4")
    assert torch.equal(strided[:, 0], flat) and bool((strided[:, 1] == -1).all())
    wide, narrow = torch.empty(100), torch.empty(100, dtype=torch.bfloat16)
    commq.reduce_scatter(wide, x, format="int4")
    commq.reduce_scatter(narrow, x, format="int4")
    assert torch.equal(wide.to(dtype), flat) and torch.equal(wide.to(torch.bfloat16), narrow)
    scalar = torch.tensor(-1.0, dtype=dtype)
    commq.reduce_scatter(scalar, torch.arange(3.0, dtype=dtype), format="int4")
    assert float(scalar) == 3.0 * rank


@thread_ranks(3)
def test_not_finite_on_one_rank_is_nan_in_its_block():
    for value in (float("nan"), float("inf"), -float("inf")):
        x, output = torch.ones(3, 500), torch.empty(500)
        if dist.get_rank() == 1:
            x[2, 130] = value
        commq.reduce_scatter(output, x, AVG, format="int4")
        bad = slice(128, 256) if dist.get_rank() == 2 else slice(0)
        assert bool(output[bad].isnan().all())
        assert int((output == 1.0).sum()) == 500 - output[bad].numel()


@thread_ranks(3)
@pytest.mark.parametrize("name", ["int4", "sign", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feedback_loses_nothing(name, dtype):
    """Sum of the inputs and old residuals == output + sum of the new residuals (classic), up to rounding of the sum."""
    rank, numel = dist.get_rank(), 1003
    residual, total_in, total_out = torch.zeros(3, numel, dtype=dtype), 0, 0
    rounding = 2.0**-22 if dtype == torch.float32 else 2.0**-9
    scale = torch.zeros(numel)
    for _ in range(4):
        x, output = torch.randn(3, numel, generator=rank_generator(5)), torch.empty(numel)
        commq.reduce_scatter(output, x, format=name, residual=residual)
        total_in = total_in + torch.stack(gather(x))[:, rank].double().sum(dim=0)
        total_out = total_out + output
        lost = torch.stack(gather(residual))[:, rank]
        scale += torch.stack(gather(x))[:, rank].abs().sum(dim=0) + lost.float().abs().sum(dim=0) + output.abs()
    assert bool(((total_in - total_out - lost.double().sum(dim=0)).abs() <= rounding * scale).all())
    assert float(lost.float().abs().max()) > 0


@thread_ranks(4)
def test_stochastic_rounding_is_unbiased_over_steps_and_repeats():
    x, steps = torch.randn(4, 200, generator=rank_generator(6)), 120
    parts = torch.stack(gather(x))[:, dist.get_rank()]
    total, output, again = torch.zeros(200), torch.empty(200), torch.empty(200)
    for step in range(steps):
        commq.reduce_scatter(output, x, AVG, format="int4", rounding="stochastic", step=step)
        total += output
    commq.reduce_scatter(again, x, AVG, format="int4", rounding="stochastic", step=steps - 1)
    assert torch.equal(output, again)
    # Rounding has a variance of at most step**2 / 4, averaged over 4 ranks.
    deviation = (float(parts.abs().max()) / 7) / 2 / 4**0.5 / steps**0.5
    assert float((total / steps - parts.mean(dim=0)).abs().max()) < 5 * deviation


@thread_ranks(2)
def test_ranks_round_with_other_random_bits():
    """1/2 of a step rounds to 0 or 1; that the mean of two ranks is 1/2 takes ranks that differ."""
    x, output = torch.full((2, 128), 0.5), torch.empty(128)
    x[:, 0] = 7.0
    commq.reduce_scatter(output, x, AVG, format="int4", rounding="stochastic")
    assert set(output.tolist()) == {0.0, 0.5, 1.0, 7.0}


@thread_ranks(3)
def test_a_rotation_is_undone():
    """The 2-norm of each rotated run keeps the bound of the rotated elements: the transform is orthogonal."""
    rotation = commq.Rotation(size=64, signs=True)
    x, output = torch.randn(3, 640, generator=rank_generator(8)), torch.empty(640)
    x[:, 99] *= 100
    commq.reduce_scatter(output, x, AVG, format="int8", rotation=rotation, seed=5, step=6)
    parts = torch.stack(gather(x))[:, dist.get_rank()]
    signs = rotation.sign_pattern(seed=5, step=6, device=x.device)
    bound = sum(error_bound(rotate(part, rotation, signs), FORMATS["int8"]).view(-1, 64).norm(dim=1) for part in parts)
    error = (output - parts.to(torch.float64).mean(dim=0)).view(-1, 64).norm(dim=1)
    assert bool((error <= bound / 3 + 2.0**-20 * parts.norm()).all())


@thread_ranks(5)
def test_subgroup():
    group, rank = dist.new_group([1, 3, 4]), dist.get_rank()
    output = torch.full((200,), -1.0)
    if rank in (1, 3, 4):
        commq.reduce_scatter(output, torch.full((600,), float(rank)), format="int4", group=group)
    assert bool((output == (8.0 if rank in (1, 3, 4) else -1.0)).all())


def reduce_all_formats():
    outputs = []
    for name in FORMATS:
        outputs.append(torch.empty(1003))
        commq.reduce_scatter(outputs[-1], torch.randn(3, 1003, generator=rank_generator(7)), AVG, format=name)
    return torch.stack(outputs)


def test_processes_give_the_same_bits_as_threads():
    for threads, processes in zip(
        run_threads(reduce_all_formats, 3), run_processes(reduce_all_formats, 3), strict=True
    ):
        assert torch.equal(threads, processes)


@process_ranks(2)
def test_async_in_pieces():
    PIECE_BYTES["cpu"] = 1 << 14
    rank = dist.get_rank()
    outputs = [torch.empty(30_000), torch.empty(7 + 2 * rank), torch.empty(50, 2).t()]
    inputs = [torch.full((60_000,), rank + 1.0), [torch.full((n,), rank + 2.0) for n in (7, 9)], torch.ones(200)]
    works = [
        commq.reduce_scatter(y, x, AVG, format="int8", async_op=True) for y, x in zip(outputs, inputs, strict=True)
    ]
    assert not works[0].is_completed() and works[0].get_future().wait()[0] is outputs[0]
    for work, output, value in zip(works, outputs, (1.5, 2.5, 1.0), strict=True):
        assert work.wait() and work.wait() and work.is_completed()
        assert bool((output == value).all())


@thread_ranks(1)
def test_one_rank_copies():
    x, output, residual = torch.randn(1000), torch.empty(1000), torch.ones(1000)
    commq.reduce_scatter(output, x, format="sign", residual=residual)
    assert torch.equal(output, x) and bool((residual == 1).all())
    x[3] = 7.0
    assert commq.reduce_scatter(output, [x], AVG, format="sign", async_op=True).wait() and torch.equal(output, x)


@thread_ranks(2)
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda y, x: commq.reduce_scatter(y, x, dist.ReduceOp.MAX, format="int8"), ValueError, "expected ReduceOp.S"),
        (lambda y, x: commq.reduce_scatter(y, x[:7], format="int8"), ValueError, "has 7 elements, expected 8"),
        (lambda y, x: commq.reduce_scatter(y, [y], format="int8"), ValueError, "list of 1 inputs, expected one for"),
        (lambda y, x: commq.reduce_scatter(y[:3], [x[:4], x[4:]], format="int8"), ValueError, "has 3 .*expected 4"),
        (lambda y, x: commq.reduce_scatter(y, [x[:4], x[4:].half()], format="int8"), TypeError, "expected one dtype"),
        (lambda y, x: commq.reduce_scatter(y.int(), x, format="int8"), TypeError, "expected float32, bfloat16"),
        (lambda y, x: commq.reduce_scatter(y.to("meta"), x, format="int8"), ValueError, "expected one device"),
        (lambda y, x: commq.reduce_scatter(x[2:6], x, format="int8"), ValueError, "share memory"),
        (lambda y, x: commq.reduce_scatter(y[:1].expand(4), x, format="int8"), ValueError, "share memory"),
        (lambda y, x: commq.reduce_scatter(y, x, format="int8", residual=y), ValueError, "of the tensor's 8"),
        (lambda y, x: commq.reduce_scatter(y, [y, y], format="int8", residual=x), ValueError, "not with a list"),
        (lambda y, x: commq.reduce_scatter(y, x, format="int3"), ValueError, "'int3' is unknown"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.ones(4), torch.ones(8))
