"""What runs inside a rank's own process; harness.run_processes is its parent."""

from __future__ import annotations

import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import os
import pickle
import random
import signal
import socket
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told."""

    module: str
    function: str
    arguments: bytes
    """Pickled (args, kwargs): plain pickle copies tensors, where multiprocessing would share their memory."""
    world_size: int
    backend: str
    timeout: float
    port: int
    """Of the parent's TCPStore."""
    environ: dict[str, str]


def rank_main(rank: int, job: Job, dump: Path, pipe: Connection) -> None:
    """Send ("returned", value), ("skipped", reason) or ("failed", text), pickled.

    A crash and SIGUSR1 write the stacks to `dump`.
    """
    os.setpgrp()  # so that the parent can kill what this rank starts, too
    threading.Thread(target=die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(job.environ)
    with dump.open("w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        pipe.send_bytes(_outcome(rank, job))


def die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


def _outcome(rank: int, job: Job) -> bytes:
    file = ""
    try:
        fn = functools.reduce(getattr, job.function.split("."), importlib.import_module(job.module))
        fn = getattr(fn, "rank_function", fn)  # a decorated test's name is the decorated one's
        file = inspect.getsourcefile(fn)
        args, kwargs = pickle.loads(job.arguments)
        _init_process(rank, job)
        value = fn(*args, **kwargs)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return pickle.dumps(("returned", value))
    except pytest.skip.Exception as skip:
        return pickle.dumps(("skipped", str(skip)))
    except BaseException as error:
        return pickle.dumps(("failed", _format_with_locals(error, file)))


def _init_process(rank: int, job: Job) -> None:
    random.seed(rank)
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if "nccl" in job.backend:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if torch.cuda.device_count() < job.world_size:  # NCCL shares one only between what seem to be hosts
            os.environ.update(NCCL_HOSTID=str(rank), NCCL_SOCKET_IFNAME=loopback, NCCL_IB_DISABLE="1")
    store, timeout = dist.TCPStore("127.0.0.1", job.port), timedelta(seconds=job.timeout)
    dist.init_process_group(job.backend, store=store, rank=rank, world_size=job.world_size, timeout=timeout)
    # A rank that ends at once must not be gone before the others have connected to it.
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{each}" for each in range(job.world_size)], timeout)


def _format_with_locals(error: BaseException, file: str) -> str:
    """The traceback, with the local variables of the test's own frames: pytest explains no assertion here."""
    report = traceback.TracebackException.from_exception(error, capture_locals=True)
    for frame in report.stack:
        shown = frame.locals if frame.filename == file else None  # None, too, of an error that another one follows
        frame.locals = {name: text[:200] for name, text in (shown or {}).items()}
    return "".join(report.format())
