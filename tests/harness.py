"""Run a test on several ranks, as threads or as processes.

    @thread_ranks(1, 2, 17)                     # one test for each number of ranks
    def test_sum():                             # runs on every rank, with torch.distributed initialised
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total)

    @process_ranks(2, backend="gloo")           # fixtures and parametrize work as usual
    def test_sum_over_sockets(tmp_path): ...

`run_threads` and `run_processes` call a function in the same way and return what it returned on each rank, in
rank order. If a rank fails, RankError says what happened on every rank that did, the first failure first.

Threads start in milliseconds and see the same objects. Their group is PyTorch's `threaded` test backend:
collectives and subgroups of CPU tensors, but no send and receive, and no DDP. They share torch's global
generator, so draw from `rank_generator(seed)`.

Processes are what users run; each has its own seed and one torch thread. A rank imports its function by name,
so that must be at module level, and arguments, fixtures included, must pickle.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from rank_process import Job, die_with_parent, rank_main

GRACE = 5.0
"""Seconds that the other ranks have to report what they saw after one failed."""

# Ranks are forked from a server that has imported what nearly all of them use (DDP and optimizers import
# torch._dynamo): milliseconds in place of seconds for each. On macOS the system's own libraries do not survive that.
forked = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")
forked.set_forkserver_preload([threaded.__name__, "torch._dynamo", "pytest", "commq", "torch.distributed.pipelining"])

if not hasattr(threaded.ThreadLocalWorld, "comms"):  # torch before 2.13 forgets it in destroy_process_group
    threaded.ThreadLocalWorld.comms = property(lambda world: [])


class RankError(AssertionError):
    """Some ranks raised, died, or did not finish in time."""

    def __init__(self, failures: Mapping[int, str]):
        ranks: dict[str, list[str]] = {}
        for rank, text in failures.items():
            ranks.setdefault(text.strip(), []).append(str(rank))
        super().__init__("\n\n".join(f"rank {', '.join(same)}: {text}" for text, same in ranks.items()))


def thread_ranks(*world_sizes: int, timeout: float = 60.0) -> Callable[[Callable], Callable]:
    return _on_ranks(partial(run_threads, timeout=timeout), world_sizes)


def process_ranks(
    *world_sizes: int, backend: str = "gloo", timeout: float = 60.0, share_gpu: bool = False
) -> Callable[[Callable], Callable]:
    """With "nccl", skipped where there are fewer GPUs than ranks, unless the ranks may share one.

    Where there are enough, each rank has its own, and what joins them (NVLink) is used.
    """
    run = partial(run_processes, backend=backend, timeout=timeout, share_gpu=share_gpu)
    decorate = _on_ranks(run, world_sizes)
    return (lambda fn: pytest.mark.gpu(decorate(fn))) if "nccl" in backend else decorate


def _on_ranks(run: Callable, world_sizes: Sequence[int]) -> Callable[[Callable], Callable]:
    def decorate(fn: Callable) -> Callable:
        @functools.wraps(fn)
        def test(world_size: int, **fixtures: Any) -> None:
            run(fn, world_size, kwargs=fixtures)

        test.rank_function = fn
        signature = inspect.signature(fn)
        world_size = inspect.Parameter("world_size", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = signature.replace(parameters=[world_size, *signature.parameters.values()])
        return pytest.mark.parametrize("world_size", world_sizes, ids="W={}".format)(test)

    return decorate


def rank_generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    """This rank's own generator: other ranks draw other numbers, and every run draws the same."""
    return torch.Generator(device).manual_seed((seed << 16) + dist.get_rank())


# Threads


def run_threads(
    fn: Callable, world_size: int, *, args: tuple = (), kwargs: Mapping | None = None, timeout: float = 60.0
) -> list:
    results = [None] * world_size
    errors: dict[int, BaseException] = {}
    store = dist.HashStore()
    limit = timedelta(seconds=timeout)
    ended = threading.Event()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size, timeout=limit)
            try:
                results[rank] = fn(*args, **(kwargs or {}))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        except BaseException as error:
            errors[rank] = error
            if not ended.is_set():  # a late rank must not stop those of the next test
                _stop_collectives()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    excepthook = sys.excepthook  # init_process_group wraps it, once for each rank
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = {rank: _stack(thread) for rank, thread in enumerate(threads) if thread.is_alive()}
    finally:
        _stop_collectives()
        for thread in threads:
            thread.join(1.0)
        ended.set()
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        sys.excepthook = excepthook

    # Ranks that only waited for a failed or late one have left with SystemExit.
    raised = {rank: error for rank, error in errors.items() if not isinstance(error, SystemExit)}
    if not late and not raised:
        raised = errors
    failures = {rank: _format(error) for rank, error in raised.items()}
    failures |= {rank: f"did not finish within {timeout:g} s; it was at\n{late[rank]}" for rank in late}
    skips = [error for error in raised.values() if isinstance(error, pytest.skip.Exception)]
    if skips and len(skips) == len(failures):
        raise skips[0]
    if failures:
        raise RankError(failures) from next(iter(raised.values()), None)
    return results


def _stop_collectives() -> None:
    """Make every rank that waits in a collective, or comes to one, leave with SystemExit."""
    group = threaded.ProcessLocalGroup
    with group._coll_lock:
        group._terminate.set()
        collectives = list(group._cur_coll_on_pgs.values())
    for collective in collectives:
        for condition in (collective._start_cond, collective._done_cond):
            with condition:
                condition.notify_all()


def _format(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident)
    return "".join(traceback.format_stack(frame)) if frame else ""


# Processes


def run_processes(
    fn: Callable,
    world_size: int,
    *,
    backend: str = "gloo",
    args: tuple = (),
    kwargs: Mapping | None = None,
    timeout: float = 60.0,
    share_gpu: bool = False,
) -> list:
    if "<locals>" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not at module level, so a process cannot import it")
    if "nccl" in backend and not share_gpu and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, found {torch.cuda.device_count()}")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = Job(
        module=fn.__module__,
        function=fn.__qualname__,
        arguments=pickle.dumps((args, dict(kwargs or {}))),
        world_size=world_size,
        backend=backend,
        timeout=timeout,
        port=store.port,
        environ=dict(os.environ),
    )
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_Rank(rank, job, Path(folder, f"rank{rank}")) for rank in range(world_size)]
        try:
            for rank in ranks:
                rank.start()
            return _collect(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()


def _collect(ranks: list[_Rank], timeout: float) -> list:
    """Wait for all ranks, or until GRACE after the first that did not return."""
    results: list = [None] * len(ranks)
    failures: dict[int, str] = {}
    skips: list[str] = []
    running = {rank.pipe: rank for rank in ranks}
    deadline = time.monotonic() + timeout
    while running and (ready := wait(running, max(0.0, deadline - time.monotonic()))):
        for rank in map(running.pop, ready):
            kind, value = rank.outcome()
            if kind == "returned":
                results[rank.number] = value
                continue
            if kind == "skipped":
                skips.append(value)
            else:
                failures[rank.number] = value
            deadline = min(deadline, time.monotonic() + GRACE)

    if skips and not failures:
        pytest.skip(skips[0])
    why = f"stopped {GRACE:g} s after the first failure" if failures else f"did not finish within {timeout:g} s"
    failures |= {rank.number: f"{why}; it was at\n{rank.stack()}" for rank in running.values()}
    if failures:
        raise RankError(failures)
    return results


class _Rank:
    """One rank's process, as its parent sees it."""

    def __init__(self, number: int, job: Job, dump: Path):
        self.number = number
        self.pipe, self._child_pipe = forked.Pipe(duplex=False)
        self._dump = dump
        self._process = forked.Process(target=rank_main, args=(number, job, dump, self._child_pipe))

    def start(self) -> None:
        self._process.start()
        self._child_pipe.close()  # so that the child's is the last, and its death is the end of the file

    def outcome(self) -> tuple[str, Any]:
        """Once the pipe is ready: ("returned", value), ("skipped", reason) or ("failed", text)."""
        try:
            kind, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            kind, value = "died", None
        self._process.join(GRACE)
        code = self._process.exitcode
        if kind == "died" or (kind == "returned" and code != 0):
            return "failed", f"{_ending(code)}\n{self._dumped()}"
        return kind, value

    def stack(self) -> str:
        """Where the process is now; empty if it has not come as far as its first line."""
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return self._dumped()

    def _dumped(self) -> str:
        stacks = self._dump.read_text().split("\n\n") if self._dump.exists() else []
        return "\n\n".join(stack for stack in stacks if die_with_parent.__name__ not in stack)

    def kill(self) -> None:
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()


def _ending(code: int | None) -> str:
    if code is None:
        return f"had not exited {GRACE:g} s after it returned"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
