"""What test_mpi.py runs under mpiexec: commq over communicators of mpi4py, and compared with gloo ranks.

Rank 0 prints `ok NAME` after each of CHECKS. A rank that fails prints its traceback and ends the job. Imports mpi4py
only where it runs, because the import starts MPI.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.distributed as dist

import commq
from commq.codecs.bounds import error_bound
from commq.codecs.formats import FORMATS, get_format
from commq.collectives import hosts
from commq.collectives.all_reduce import SCHEDULES
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.lost import RankLostError
from commq.collectives.rendezvous import init_process_group
from numerics import mean_rounding

RANKS = 4
LOST = 2
SUM, AVG, MAX = dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX
CHECKS: dict[str, Callable] = {}


def check(fn: Callable) -> Callable:
    CHECKS[fn.__name__] = fn
    return fn


def random(world, numel: int = 1003) -> torch.Tensor:
    """Another tensor on each rank, with magnitudes that differ by 1000."""
    rank = world.Get_rank()
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank + 1)) * 10.0 ** (rank - 2)


def raises(error: type[Exception], says: str, call: Callable) -> Exception:
    try:
        call()
    except error as raised:
        assert says in str(raised), raised
        return raised
    raise AssertionError(f"raised no {error.__name__}")


@cache
def formats_of(schedule: str) -> list[str]:
    """The formats that a schedule takes; it must say of the others that it is the format it does not take."""
    from mpi4py import MPI

    taken = []
    for name in FORMATS:
        try:
            commq.all_reduce(torch.ones(1003), format=name, schedule=schedule, group=MPI.COMM_WORLD)
            taken.append(name)
        except ValueError as error:
            assert f"format {name!r}" in str(error), error
    assert taken, schedule
    return taken


def ones_average_to_exactly_one(schedule: str, world) -> None:
    for name in formats_of(schedule):
        for numel in (1, 127, 1003):
            x = torch.ones(numel)
            commq.all_reduce(x, AVG, format=name, schedule=schedule, group=world)
            assert bool((x == 1.0).all()), (name, numel)


def same_bits_as_gloo_and_within_the_bound(schedule: str, world) -> None:
    taken = formats_of(schedule)
    name = next(name for name in ("int8", "int4", "sign") if name in taken)
    x = random(world)
    ours, theirs = x.clone(), x.clone()
    commq.all_reduce(ours, AVG, format=name, schedule=schedule, group=world)
    commq.all_reduce(theirs, AVG, format=name, schedule=schedule)
    assert all(torch.equal(row, ours) for row in world.allgather(ours))
    if schedule == "plain":  # sums are the library's
        bound = 2 * mean_rounding(torch.stack(world.allgather(x)))
        assert bool(((ours - theirs.to(torch.float64)).abs() <= bound).all())
    else:
        assert torch.equal(ours, theirs)
    if name == "int8":
        inputs = torch.stack(world.allgather(x)).to(torch.float64)
        first = torch.stack([error_bound(row.to(torch.float32), get_format(name)) for row in inputs]).mean(dim=0)
        # A schedule encodes a partial sum at most once for each rank.
        most = (inputs.abs().mean(dim=0) + first).to(torch.float32)
        bound = first + RANKS * error_bound(most, get_format(name)) + 2.0**-20 * inputs.abs().sum(dim=0)
        assert bool(((ours - inputs.mean(dim=0)).abs() <= bound).all())


for _schedule in SCHEDULES:
    for _fn in (ones_average_to_exactly_one, same_bits_as_gloo_and_within_the_bound):
        CHECKS[f"{_fn.__name__}_{_schedule}"] = partial(_fn, _schedule)


@check
def the_environment_is_that_of_torchrun(world):
    assert (dist.get_rank(), dist.get_world_size()) == (world.Get_rank(), RANKS)
    expected = {"RANK": str(world.Get_rank()), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    assert {name: os.environ[name] for name in expected} == expected
    assert sorted(world.allgather(int(os.environ["LOCAL_RANK"]))) == list(range(RANKS))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


@check
def a_list_travels_in_one_exchange(world):
    xs = [torch.full((numel,), float(world.Get_rank() + numel)) for numel in (1000, 1, 4097)]
    commq.all_reduce(xs, AVG, format="int8", schedule="two_shot", group=world)
    assert [bool((x == x.numel() + 1.5).all()) for x in xs] == [True] * 3


@check
def asynchronous_works_finish_in_order(world):
    xs = [torch.full((20_000,), float(i + world.Get_rank())) for i in range(6)]
    options = {"format": "int8", "schedule": "two_shot", "async_op": True}
    works = [commq.all_reduce(x, AVG, group=group, **options) for x, group in zip(xs, [world, None] * 3, strict=True)]
    assert not works[0].is_completed()
    for i, (work, x) in enumerate(zip(works, xs, strict=True)):
        work.wait()
        work.wait()  # a second wait changes nothing
        assert bool((x == i + 1.5).all())


@check
def long_messages_travel_in_pieces_and_runs(world):
    from commq.collectives import mpi

    x = random(world, 100_003 * 8)
    whole, cut, summed = x.clone(), x.clone(), x.clone()
    commq.all_reduce(whole, AVG, format="int8", schedule="two_shot")
    before = dict(PIECE_BYTES), mpi.RUN_BYTES
    PIECE_BYTES["cpu"], mpi.RUN_BYTES = 1 << 18, 10_000
    commq.all_reduce(cut, AVG, format="int8", schedule="two_shot", group=world)
    commq.all_reduce(summed, AVG, format="int8", schedule="plain", group=world)
    PIECE_BYTES.update(before[0])
    mpi.RUN_BYTES = before[1]
    assert torch.equal(whole, cut)
    inputs = torch.stack(world.allgather(x)).to(torch.float64)
    assert bool(((summed - inputs.mean(dim=0)).abs() <= mean_rounding(inputs)).all())


@check
def sums_in_every_dtype(world):
    from commq.collectives.mpi import Mpi

    transport, rank = Mpi.of(world), world.Get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        x = torch.full((1003,), rank + 1, dtype=dtype)
        transport.all_reduce(x, SUM).wait()
        assert bool((x == 10).all()), dtype
    x = torch.tensor([rank, -rank, 0x7FC00000 if rank == 1 else 5], dtype=torch.int32)
    transport.all_reduce(x, MAX).wait()
    assert x.tolist() == [RANKS - 1, 0, 0x7FC00000]
    raises(TypeError, "int32, or MAX", lambda: transport.all_reduce(torch.ones(3, dtype=torch.int64), SUM))


@check
def every_rank_learns_what_the_others_share(world):
    from commq.collectives.mpi import Mpi

    rank = world.Get_rank()
    assert Mpi.of(world).share({"rank": rank, "text": "x" * rank}) == [
        {"rank": other, "text": "x" * other} for other in range(RANKS)
    ]


@check
def a_sub_communicator_has_ranks_of_its_own(world):
    from mpi4py import MPI

    from commq.collectives.mpi import Mpi

    rank = world.Get_rank()
    for times in range(3):
        half = world.Split(color=rank % 2, key=-rank)
        transport = Mpi.of(half)
        assert transport is Mpi.of(half) and transport is not Mpi.of(world)
        assert (transport.rank, transport.world_size) == (half.Get_rank(), 2)
        assert not transport.memory.facts  # nothing of a communicator that was freed
        transport.memory.facts["times"] = times
        x = torch.full((500,), float(rank))
        commq.all_reduce(x, format="int4", group=half, schedule="two_shot")
        assert bool((x == (2.0 if rank % 2 == 0 else 4.0)).all())
        half.Free()
        assert transport.comm == MPI.COMM_NULL  # the duplicate is freed, too


@check
def reduce_scatter_of_uneven_parts(world):
    rank, lengths = world.Get_rank(), (1000, 0, 1, 513)
    parts = [torch.full((length,), float(rank + i)) for i, length in enumerate(lengths)]
    output = torch.empty(lengths[rank])
    commq.reduce_scatter(output, parts, AVG, format="int8", group=world)
    assert bool((output == rank + 1.5).all())
    x = random(world, RANKS * 129)
    ours, theirs = torch.empty(129), torch.empty(129)
    commq.reduce_scatter(ours, x, format="int4", group=world)
    commq.reduce_scatter(theirs, x, format="int4")
    assert torch.equal(ours, theirs)


@check
def all_gather_of_uneven_parts(world):
    rank, lengths = world.Get_rank(), (1000, 0, 1, 513)
    outputs = [torch.empty(length) for length in lengths]
    commq.all_gather(outputs, torch.full((lengths[rank],), float(rank)), format="int8", group=world)
    assert all(bool((output == i).all()) for i, output in enumerate(outputs))
    ours, theirs = torch.empty(RANKS * 129), torch.empty(RANKS * 129)
    commq.all_gather(ours, random(world, 129), format="int4", group=world)
    commq.all_gather(theirs, random(world, 129), format="int4")
    assert torch.equal(ours, theirs)


@check
def all_to_all_of_uneven_splits(world):
    rank = world.Get_rank()
    sent = [100 * rank + dst for dst in range(RANKS)]  # rank 0 sends itself nothing
    received = [100 * src + rank for src in range(RANKS)]
    x = torch.cat([torch.full((length,), float(10 * rank + dst)) for dst, length in enumerate(sent)])
    output = torch.empty(sum(received))
    commq.all_to_all(output, x, received, sent, format="int8", group=world)
    expected = torch.cat([torch.full((length,), float(10 * src + rank)) for src, length in enumerate(received)])
    assert torch.equal(output, expected)
    ours, theirs, x = torch.empty(RANKS * 129), torch.empty(RANKS * 129), random(world, RANKS * 129)
    commq.all_to_all(ours, x, format="int4", group=world)
    commq.all_to_all(theirs, x, format="int4")
    assert torch.equal(ours, theirs)


@check
def broadcast_from_any_rank(world):
    for src in (0, RANKS - 1):
        ours, theirs = random(world), random(world)
        commq.broadcast(ours, src, format="int4", group=world)
        commq.broadcast(theirs, src, format="int4")
        assert torch.equal(ours, theirs)
        assert all(torch.equal(row, ours) for row in world.allgather(ours))


@check
def neighbours_send_and_receive_beside_collectives(world):
    """Ranks 1 and 3 talk to each other beside an all-reduce of everybody, one before it starts and one after."""
    rank, works = world.Get_rank(), []
    total = torch.full((50_000,), float(rank))
    options = {"format": "int8", "group": world, "async_op": True}

    def talk() -> None:
        for numel in (5, 300_000):
            received = torch.empty(numel)
            sending = commq.send(torch.full((numel,), float(rank)), 4 - rank, **options)
            works.append((commq.recv(received, 4 - rank, **options), sending, received))

    if rank == 1:
        talk()
    work = commq.all_reduce(total, AVG, schedule="two_shot", **options)
    if rank == 3:
        talk()
    work.wait()
    assert bool((total == 1.5).all())
    for receiving, sending, received in works:
        receiving.wait()
        sending.wait()
        assert bool((received == 4 - rank).all())
    again = torch.ones(1000)
    commq.all_reduce(again, format="int8", schedule="two_shot", group=world)
    assert bool((again == RANKS).all())


@check
def what_is_no_host_memory_or_no_member_is_refused(world):
    from mpi4py import MPI

    from commq.collectives.mpi import Mpi

    elsewhere = torch.empty(8, dtype=torch.uint8, device="meta")
    raises(TypeError, "tensor on meta, expected host memory", lambda: Mpi.of(world).broadcast(elsewhere, 0))
    strided = torch.ones(8, dtype=torch.int32)[::2]
    raises(ValueError, "expected contiguous memory", lambda: Mpi.of(world).all_reduce(strided, SUM))
    one = torch.ones(1)
    raises(ValueError, "COMM_NULL", lambda: commq.all_reduce(one, format="int8", group=MPI.COMM_NULL))
    raises(
        TypeError, "got Info, expected a ProcessGroup", lambda: commq.all_reduce(one, format="int8", group=MPI.INFO_ENV)
    )


@check
def a_message_of_another_length_is_an_error_that_names_rank_and_operation(world):
    from commq.collectives.mpi import Mpi

    comm, rank = world.Dup(), world.Get_rank()
    transport = Mpi.of(comm, timeout=5.0)
    if rank == 0:
        transport.send(torch.zeros(100, dtype=torch.uint8), 1).wait()
    if rank == 1:
        short = torch.zeros(10, dtype=torch.uint8)
        error = raises(RuntimeError, "rank 1 of 4: recv with rank 0 failed", lambda: transport.recv(short, 0).wait())
        assert not isinstance(error, RankLostError)


@check
def ranks_that_make_different_calls_hear_that_all_are_alive(world):
    from commq.collectives.mpi import Mpi

    transport = Mpi.of(world.Dup(), timeout=1.0)
    buffer = torch.zeros(10, dtype=torch.uint8)
    before = (world.Get_rank() - 1) % RANKS
    error = raises(RuntimeError, "recv did not end within 1 s", lambda: transport.recv(buffer, before).wait())
    assert "all ranks wait" in str(error) and not isinstance(error, RankLostError)


def the_lost_rank_is_named(schedule: str, numel: int, world) -> None:
    from commq.collectives.mpi import Mpi

    comm = world.Dup()
    Mpi.of(comm, timeout=1.5)
    world.Barrier()
    if world.Get_rank() == LOST:
        return
    begin = time.monotonic()
    says = "Look at the output there"
    reduce = partial(commq.all_reduce, torch.ones(numel), format="int8", schedule=schedule, group=comm)
    error = raises(RankLostError, says, reduce)
    assert error.ranks == (LOST,) and f"nothing from rank {LOST}. " in str(error), error
    assert f"rank {world.Get_rank()} of {RANKS}: all_" in str(error)
    assert time.monotonic() - begin < 10.0


CHECKS["the_lost_rank_is_named_by_its_messages"] = partial(the_lost_rank_is_named, "two_shot", 3_000_000)
CHECKS["the_lost_rank_is_named_by_a_roll_call"] = partial(the_lost_rank_is_named, "plain", 1000)


def main() -> None:
    from mpi4py import MPI

    from commq.collectives.mpi import Mpi

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    assert world.Get_size() == RANKS, f"expected {RANKS} ranks, found {world.Get_size()}"
    try:
        hosts.host_key = lambda: f"host {world.Get_rank() % 2}"  # two hosts, for two_hop
        init_process_group("gloo")
        Mpi.of(world, timeout=30.0)
        for name, fn in CHECKS.items():
            fn(world)
            world.Barrier()
            if world.Get_rank() == 0:
                print("ok", name, flush=True)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)


if __name__ == "__main__":
    main()
