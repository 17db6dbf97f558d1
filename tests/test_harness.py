import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness import RankError, process_ranks, rank_generator, run_processes, run_threads, thread_ranks
from numerics import nasty_inputs

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def message(source: int, to: int, length: int) -> Tensor:
    return torch.full((length,), (17 * source + to) % 251, dtype=torch.uint8)


def check_all_to_all() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty(3 * size, dtype=torch.uint8)
    work = dist.all_to_all_single(received, torch.cat([message(rank, to, 3) for to in range(size)]), async_op=True)
    work.wait()
    assert received.equal(torch.cat([message(source, rank, 3) for source in range(size)]))


def check_all_to_all_uneven() -> None:
    """Rank r sends (r + to) % 3 bytes to rank `to`: some messages are empty."""
    rank, size = dist.get_rank(), dist.get_world_size()
    lengths = [(rank + other) % 3 for other in range(size)]
    received = torch.empty(sum(lengths), dtype=torch.uint8)
    sent = torch.cat([message(rank, to, length) for to, length in enumerate(lengths)])
    dist.all_to_all_single(received, sent, output_split_sizes=lengths, input_split_sizes=lengths)
    assert received.equal(torch.cat([message(source, rank, length) for source, length in enumerate(lengths)]))


def check_all_gather() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    gathered = torch.empty(5 * size, dtype=torch.uint8)
    all_gather_single(gathered, message(rank, 0, 5))
    assert gathered.equal(torch.cat([message(source, 0, 5) for source in range(size)]))


def check_all_gather_object() -> None:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"rank": dist.get_rank(), "text": "x" * dist.get_rank()})
    assert gathered == [{"rank": rank, "text": "x" * rank} for rank in range(dist.get_world_size())]


def check_broadcast() -> None:
    for source in {0, dist.get_world_size() - 1}:
        value = torch.tensor([float(dist.get_rank())])
        dist.broadcast(value, src=source)
        assert value.item() == source


def check_all_reduce() -> None:
    size = dist.get_world_size()
    for op, expected in ((dist.ReduceOp.SUM, size * (size - 1) / 2), (dist.ReduceOp.MAX, size - 1)):
        value = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(value, op)
        assert value.item() == expected


def check_reduce_scatter() -> None:
    size = dist.get_world_size()
    mine = torch.empty(2)
    reduce_scatter_single(mine, torch.arange(2.0 * size))
    assert mine.equal(size * torch.tensor([2.0 * dist.get_rank(), 2.0 * dist.get_rank() + 1]))


def check_subgroups() -> None:
    """Even ranks with even ranks, odd with odd; every rank takes part in making every group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    members = [list(range(first, size, 2)) for first in range(min(2, size))]
    group = [dist.new_group(ranks) for ranks in members][rank % 2]
    value = torch.tensor([float(rank)])
    dist.all_reduce(value, group=group)
    dist.barrier()
    assert value.item() == sum(members[rank % 2])


CHECKS = [
    check_all_to_all,
    check_all_to_all_uneven,
    check_all_gather,
    check_all_gather_object,
    check_broadcast,
    check_all_reduce,
    check_reduce_scatter,
    check_subgroups,
]


@pytest.mark.parametrize("check", CHECKS)
@thread_ranks(1, 2, 3, 8, 17)
def test_collectives_of_threads(check):
    check()


@thread_ranks(8)
def test_collectives_of_threads_in_quick_succession():
    for _ in range(100):
        check_all_to_all_uneven()
        check_all_gather_object()
        check_all_reduce()


@process_ranks(1, 3)
def test_collectives_of_processes():
    for check in CHECKS:
        check()


@pytest.mark.gpu
@process_ranks(2, backend="nccl", share_gpu=True)
def test_ranks_that_share_a_gpu():
    value = torch.ones(1000, device="cuda")
    dist.all_reduce(value)
    assert value.eq(2).all()


@pytest.mark.parametrize("factor", [2, 3])
@thread_ranks(2)
def test_threads_get_fixtures_and_parameters(tmp_path, factor):
    (tmp_path / str(dist.get_rank())).write_text(str(factor))
    dist.barrier()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(factor)] * 2


@pytest.mark.parametrize("factor", [2, 3])
@process_ranks(2)
def test_processes_get_fixtures_and_parameters(tmp_path, factor):
    (tmp_path / str(dist.get_rank())).write_text(str(factor))
    dist.barrier()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(factor)] * 2


def draw() -> Tensor:
    return torch.rand(3, generator=rank_generator(seed=7))


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_each_rank_has_its_own_generator_and_results_come_in_rank_order(run):
    ours, again = run(draw, 3), run(draw, 3)
    assert torch.stack(ours).equal(torch.stack(again))
    assert len({tuple(numbers.tolist()) for numbers in ours}) == 3


def global_draws(megabytes: int) -> tuple:
    return torch.rand(1).item(), random.random(), torch.get_num_threads(), torch.ones(megabytes << 18)


def test_processes_are_seeded_and_return_large_results():
    (first, *_), (second, *_) = results = run_processes(global_draws, 2, args=(8,))
    assert first != second
    assert [threads for _, _, threads, _ in results] == [1, 1]
    assert all(big.eq(1).all() and len(big) == 8 << 18 for *_, big in results)


def read_environment() -> str:
    return os.environ["COMMQ_TEST"]


def test_processes_see_the_environment_of_now(monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("COMMQ_TEST", value)
        assert run_processes(read_environment, 1) == [value]


def fail_on(*ranks: int) -> None:
    found = dist.get_rank()
    if found in ranks:
        raise ValueError(f"rank {found} is not well")
    dist.barrier()


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_a_failing_rank_fails_the_test_at_once(run):
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1: .*\n(.*\n)*ValueError: rank 1 is not well"):
        run(fail_on, 3, args=(1,))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_every_failing_rank_is_shown(run):
    with pytest.raises(RankError) as raised:
        run(fail_on, 2, args=(0, 1))
    assert "rank 0 is not well" in str(raised.value)
    assert "rank 1 is not well" in str(raised.value)


def test_a_process_that_fails_shows_the_local_variables_of_the_test():
    with pytest.raises(RankError, match="found = 0"):
        run_processes(fail_on, 1, args=(0,))


wake = threading.Event()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        wake.wait(20)
    else:
        dist.barrier()


@pytest.mark.parametrize(("run", "limit"), [(run_threads, 1), (run_processes, 5)])
def test_a_hanging_rank_fails_the_test_within_its_limit_and_shows_where_it_was(run, limit):
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1: did not finish within \d s(.*\n)*.*sleep_on"):
        run(sleep_on, 2, args=(1,), timeout=limit)
    assert time.monotonic() - start < limit + 5
    wake.set()


def hang_in_collective() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_threads_that_wait_for_a_rank_that_left_fail_the_test_and_end():
    before = threading.active_count()
    with pytest.raises(RankError, match="rank 0: did not finish within 1 s"):
        run_threads(hang_in_collective, 2, timeout=1)
    assert threading.active_count() == before
    assert run_threads(dist.get_rank, 2) == [0, 1]


def die_on(rank: int, how: str) -> None:
    if dist.get_rank() == rank:
        os._exit(3) if how == "exit" else os.kill(os.getpid(), getattr(signal, how))
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("SIGKILL", "rank 1: was killed by SIGKILL"),
        ("SIGSEGV", "rank 1: was killed by SIGSEGV\n(.*\n)*.*die_on"),
        ("exit", "rank 1: exited with code 3"),
    ],
)
def test_a_dying_rank_fails_the_test(how, expected):
    with pytest.raises(RankError, match=expected):
        run_processes(die_on, 2, args=(1, how))


def stop_at(folder) -> None:
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    time.sleep(20)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_process_outlives_its_test(tmp_path):
    with pytest.raises(RankError):
        run_processes(stop_at, 2, args=(tmp_path,), timeout=5)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(is_running, pids))


def skip_it() -> None:
    pytest.skip("no reason")


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_a_rank_can_skip(run):
    with pytest.raises(pytest.skip.Exception, match="no reason"):
        run(skip_it, 2)


def test_a_local_function_cannot_be_sent_to_a_process():
    def local() -> None: ...

    with pytest.raises(ValueError, match="not at module level"):
        run_processes(local, 2)


def test_nasty_inputs_are_what_they_say():
    inputs = nasty_inputs()
    assert all(x.dtype == torch.float32 and x.dim() == 1 for x in inputs.values())
    assert {name for name, x in inputs.items() if not x.isfinite().all()} == {"inf", "nan", "inf nan"}
    tiny = inputs["subnormals"].abs()
    assert 0 < tiny.max() < torch.finfo(torch.float32).smallest_normal
    assert all(x.equal(y) for x, y in zip(inputs.values(), nasty_inputs().values(), strict=True) if x.isfinite().all())
