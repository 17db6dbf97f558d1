"""Collectives over NCCL: the same bits as over gloo on the CPU, for every schedule. Ranks may share one GPU."""

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.formats import FORMATS
from commq.collectives import slices
from commq.collectives.all_reduce import answer_residual_numel
from commq.collectives.memory import memory_of
from harness import rank_generator, run_processes
from placements import neighbours, pretend

pytestmark = pytest.mark.gpu
AVG = dist.ReduceOp.AVG
NCCL = {"backend": "cpu:gloo,cuda:nccl", "share_gpu": True, "timeout": 240.0}
LENGTHS = 1, 1003, 70_000


def draw(numel, device, seed=3):
    return torch.randn(numel, generator=rank_generator(seed)).to(device)


def reduce_by_every_schedule(device):
    if dist.get_world_size() == 4:
        pretend(neighbours(4, 2))
    schedules = {
        "two_shot": FORMATS,
        "one_shot": ("int4", "nvfp4"),
        "ring": ("int8", "sign"),
        "two_hop": ("int8", "int4", "sign"),
        "integer_sum": ("int8", "int4"),
        "one_bit": ("sign",),
    }
    for schedule, formats in schedules.items():
        for name in formats:
            for numel in LENGTHS:
                tensor = draw(numel, device)
                commq.all_reduce(tensor, AVG, format=name, schedule=schedule)
                yield f"{schedule} {name} {numel}", tensor


def reduce_with_options(device):
    for options in (
        {"format": "int4", "rounding": "stochastic", "rotation": 32, "seed": 5, "step": 7},
        {"format": "int4", "answer": "int8"},
    ):
        tensors = [draw(numel, device, seed=numel) for numel in LENGTHS]
        commq.all_reduce(tensors, schedule="two_shot", **options)
        yield from ((str(options), tensor) for tensor in tensors)
    numel = 50_003
    residual = torch.zeros(numel, device=device)
    second = torch.zeros(
        answer_residual_numel(numel, format="sign", world_size=dist.get_world_size(), device=device), device=device
    )
    for step in range(3):
        tensor = draw(numel, device, seed=step)
        commq.all_reduce(
            tensor, AVG, format="sign", schedule="two_shot", residual=residual, answer_residual=second, step=step
        )
        yield f"feedback on both hops, step {step}", tensor
    yield "residual", residual
    yield "residual of the answer", second


def move_by_every_collective(device):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name in ("int8", "int4", "sign", "fp8_e4m3", "mxfp4", "bf16"):
        for numel in LENGTHS:
            own, whole = torch.empty(numel, device=device), torch.empty(numel * world_size, device=device)
            commq.reduce_scatter(own, draw(numel * world_size, device), format=name)
            yield f"reduce_scatter {name} {numel}", own
            commq.all_gather(whole, own, format=name)
            yield f"all_gather {name} {numel}", whole
            tensor = draw(numel, device)
            commq.broadcast(tensor, world_size - 1, format=name)
            yield f"broadcast {name} {numel}", tensor
            splits = [(numel + rank + peer) % 700 for peer in range(world_size)]
            arrived = torch.empty(sum(splits), device=device)
            commq.all_to_all(arrived, draw(sum(splits), device), splits, splits, format=name)
            yield f"all_to_all {name} {numel}", arrived
            if rank == 0:
                commq.send(tensor, 1, format=name)
            elif rank == 1:
                commq.recv(tensor, 0, format=name)
            yield f"send and recv {name} {numel}", tensor


def everything(device):
    parts = reduce_by_every_schedule, reduce_with_options, move_by_every_collective
    return [(what, tensor.cpu().clone()) for part in parts for what, tensor in part(device)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_nccl_gives_the_same_bits_as_gloo(ranks):
    on_cpu = run_processes(everything, ranks, args=("cpu",), timeout=240)
    on_gpu = run_processes(everything, ranks, args=("cuda",), **NCCL)
    for rank, (here, there) in enumerate(zip(on_cpu, on_gpu, strict=True)):
        for (what, a), (_, b) in zip(here, there, strict=True):
            assert torch.equal(a, b), f"rank {rank}: {what}"


def in_slices(device):
    """Rows of several slices, the last one short: two_shot in a flat group, two_hop between hosts of two ranks."""
    if dist.get_world_size() == 4:
        pretend(neighbours(4, 2))
    memory_of(dist.group.WORLD).facts["slice"] = 4096
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "FEWEST_BYTES", 4096)
        for schedule in ("two_shot", "two_hop"):
            tensor = draw(70_003, device)
            commq.all_reduce(tensor, AVG, format="int4", schedule=schedule)
            yield schedule, tensor.cpu()


def sliced(device):
    return list(in_slices(device))


@pytest.mark.parametrize("ranks", [3, 4])
def test_slices_do_not_change_the_bits(ranks):
    on_cpu = run_processes(sliced, ranks, args=("cpu",), timeout=240)
    on_gpu = run_processes(sliced, ranks, args=("cuda",), **NCCL)
    for here, there in zip(on_cpu, on_gpu, strict=True):
        for (what, a), (_, b) in zip(here, there, strict=True):
            assert torch.equal(a, b), what


def overlap_many():
    """Many asynchronous collectives under way on side streams, on memory that is freed and taken again at once."""
    world_size = dist.get_world_size()
    for _ in range(20):
        tensors = [torch.full((1 << 18,), float(i + dist.get_rank()), device="cuda") for i in range(8)]
        works = [
            commq.all_reduce(each.mul_(2), AVG, format="int8", schedule="two_shot", async_op=True) for each in tensors
        ]
        noise = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(8)]
        for i, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
            work.wait()
            assert bool((tensor == 2 * i + world_size - 1.0).all())
        del noise


@pytest.mark.parametrize("ranks", [2, 4])
def test_streams_and_memory_under_load(ranks):
    run_processes(overlap_many, ranks, **NCCL)
