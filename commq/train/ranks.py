"""The processes of a job: how they join, and what they must have in common."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from commq.collectives.rendezvous import Rendezvous, find_rendezvous, init_process_group


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    group: the process group that gradients use, NCCL or gloo. The default group is always gloo on the
        CPU, for small control messages that must not wait for a GPU.
    threads: CPU threads of this process: usable cores // processes on this machine, at least 1.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    threads: int

    def __str__(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        threads = "thread" if self.threads == 1 else "threads"
        backend = dist.get_backend(self.group)
        return f"{processes}, {self.device.type} with {backend}, {self.threads} {threads} each"


def join_ranks() -> Ranks:
    """Join the job that torchrun, mpirun or srun describes in the environment; without one, be a job of one process.

    Makes torch deterministic: the same seed gives the same bits on the same kind of machine.
    """
    found = find_rendezvous(os.environ) or Rendezvous(0, 1)
    rank, world_size, local_rank, local_size = found.rank, found.world_size, found.local_rank, found.local_world_size
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // local_size)
    torch.set_num_threads(threads)

    init_process_group("gloo")
    has_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    compare_ranks({"a GPU for each process": has_gpu})
    if not has_gpu:
        assert dist.group.WORLD is not None
        return Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD, threads)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Ranks(rank, world_size, device, dist.new_group(backend="nccl"), threads)


def compare_ranks(facts: Mapping[str, object], error: Exception | None = None) -> None:
    """All ranks call this at the same point; it waits for all of them.

    ValueError, the same on every rank: some rank brought an error, or a fact is not the same everywhere.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (facts, None if error is None else str(error)))
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise ValueError(message if len(everyone) == 1 else f"{message} (found by rank {rank})")
    for name in facts:
        values = [theirs[name] for theirs, _ in everyone]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"{name} differs between processes: rank 0 has {values[0]!r}, rank {rank} has {value!r}; "
                    "start all of them with the same options and files"
                )


def check_stages(stages: int, ranks: Ranks) -> None:
    """ValueError if the ranks cannot be dealt out to pipelines of so many stages."""
    if ranks.world_size % stages:
        raise ValueError(
            f"--pipeline-stages {stages} with {ranks.world_size} processes: expected a multiple of {stages} processes"
        )
