"""How the processes of a job find each other: what torchrun, mpirun and srun say in the environment.

torchrun's variables win over MPI's, and MPI's over SLURM's: a job's script may run torchrun or mpirun in an allocation
of SLURM, whose variables then describe the script, not the ranks. For the same reason SLURM's count only in a step of
srun, not in the shell of sbatch or salloc.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_hash_store: Any = dist.HashStore  # type: ignore[attr-defined]
_tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]

_SPECIAL_STEPS = 0xFFFFFFF0
"""SLURM numbers the shells of sbatch and salloc from here on, as if they were steps."""


@dataclass(frozen=True)
class Rendezvous:
    """This process among the others. `local` counts those on the same machine; 0 of 1 where nothing says more."""

    rank: int
    world_size: int
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str = "none"
    """torchrun (or whatever else sets RANK and WORLD_SIZE), Open MPI, MPICH (Intel MPI, too), PMIx, srun, or none."""


def init_process_group(backend: str | None = None, *, timeout: timedelta | None = None, **options: Any) -> Rendezvous:
    """`dist.init_process_group` for torchrun, mpirun, srun, and a process that is alone. Returns what it found.

    Under mpirun without MASTER_ADDR and MASTER_PORT the ranks meet through mpi4py. Sets those of torchrun's variables
    that are missing. options: those of torch, but for what says where ranks meet. Raises ValueError as
    `find_rendezvous`, and if nothing says where rank 0 is.
    """
    found = find_rendezvous(os.environ) or Rendezvous(0, 1)
    where: dict[str, Any] = {}  # nothing: torch reads the environment
    if found.world_size == 1 and not (found.launcher == "torchrun" and found.master_addr):
        where = {"store": _hash_store(), "rank": 0, "world_size": 1}
    elif found.launcher != "torchrun" and (found.master_addr is None or found.master_port is None):
        store, found = _meet_by_mpi(found, timeout)
        where = {"store": store, "rank": found.rank, "world_size": found.world_size}
    if found.launcher != "none":
        for name in ("rank", "world_size", "local_rank", "local_world_size", "master_addr", "master_port"):
            if (value := getattr(found, name)) is not None:
                os.environ[name.upper()] = str(value)
    dist.init_process_group(backend, timeout=timeout, **where, **options)
    return found


def find_rendezvous(environ: Mapping[str, str]) -> Rendezvous | None:
    """What the launcher says in `environ`; None without one.

    LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, where set, win over the launcher's own variables.
    Raises ValueError if variables contradict each other or are no numbers.
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}
    found = _torchrun(environ) or _open_mpi(environ) or _mpich(environ) or _srun(environ) or _pmix(environ)
    size = _integer(environ, "WORLD_SIZE")
    if found is None:
        if size not in (None, 1):
            raise ValueError(f"WORLD_SIZE={size}, but nothing says which rank this is; expected RANK, too")
        return None
    if size not in (None, found.world_size):
        raise ValueError(f"WORLD_SIZE={size}, but {found.launcher} started {found.world_size} ranks; unset WORLD_SIZE")
    found = replace(
        found,
        local_rank=_integer(environ, "LOCAL_RANK", default=found.local_rank),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", default=found.local_world_size),
        master_addr=environ.get("MASTER_ADDR", found.master_addr),
        master_port=_integer(environ, "MASTER_PORT", default=found.master_port),
    )
    for what, rank, count in (
        ("rank", found.rank, found.world_size),
        ("local rank", found.local_rank, found.local_world_size),
    ):
        if rank >= count:
            raise ValueError(f"{found.launcher}: {what} {rank} of {count}, expected 0 to {count - 1}")
    if found.local_world_size > found.world_size:
        raise ValueError(
            f"{found.launcher}: {found.local_world_size} ranks on this machine, expected at most all {found.world_size}"
        )
    return found


def first_host(nodelist: str) -> str:
    """The first of the hosts in SLURM's notation: gpu003 of `gpu[003-005,9],cpu1`. ValueError if it is none."""
    first = re.match(r"(?:[^,\[\]]|\[[^,\[\]-]+[^\[\]]*\])+(?=,|$)", nodelist)
    if first is None:
        raise ValueError(f"node list {nodelist!r} is not in SLURM's notation, such as gpu[003-005,9]; set MASTER_ADDR")
    return re.sub(r"\[([^,-]+)[^\]]*\]", r"\1", first.group())


def _torchrun(environ: Mapping[str, str]) -> Rendezvous | None:
    rank = _integer(environ, "RANK")
    return None if rank is None else Rendezvous(rank, _size(environ, "RANK", "WORLD_SIZE"), launcher="torchrun")


def _open_mpi(environ: Mapping[str, str]) -> Rendezvous | None:
    rank = _integer(environ, "OMPI_COMM_WORLD_RANK")
    if rank is None:
        return None
    return Rendezvous(
        rank,
        _size(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK", default=0),
        _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1),
        launcher="Open MPI",
    )


def _mpich(environ: Mapping[str, str]) -> Rendezvous | None:
    rank = _integer(environ, "PMI_RANK")
    if rank is None:
        return None
    found = Rendezvous(rank, _size(environ, "PMI_RANK", "PMI_SIZE"), launcher="MPICH")
    for local_rank, local_size in (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")):
        if local_rank in environ and local_size in environ:
            local = _integer(environ, local_rank, default=0), _integer(environ, local_size, default=1)
            return replace(found, local_rank=local[0], local_world_size=local[1])
    # srun --mpi=pmi2. Where Hydra uses srun to start its proxies, SLURM counts those.
    step = _srun(environ)
    same = step is not None and (step.rank, step.world_size) == (found.rank, found.world_size)
    return step if same else found


def _pmix(environ: Mapping[str, str]) -> Rendezvous | None:
    rank = _integer(environ, "PMIX_RANK")
    return None if rank is None else Rendezvous(rank, _size(environ, "PMIX_RANK", "WORLD_SIZE"), launcher="PMIx")


def _srun(environ: Mapping[str, str]) -> Rendezvous | None:
    step, rank = _integer(environ, "SLURM_STEP_ID"), _integer(environ, "SLURM_PROCID")
    if step is None or step >= _SPECIAL_STEPS or rank is None:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _size(environ, "SLURM_PROCID", size)
    nodes = next((environ[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if n in environ), None)
    job = _integer(environ, "SLURM_JOB_ID")
    return Rendezvous(
        rank,
        world_size,
        _integer(environ, "SLURM_LOCALID", default=0),
        _tasks_on_this_node(environ, world_size),
        first_host(nodes) if nodes is not None and "MASTER_ADDR" not in environ else None,
        # Below the ports that Linux gives to clients; another one for each job of a host and each step of a job.
        10_000 + (job * 31 + step) % 20_000 if job is not None else None,
        launcher="srun",
    )


def _tasks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """From lists such as 4(x2),3: four tasks on each of two nodes, three on the next."""
    node = _integer(environ, "SLURM_NODEID", default=0)
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        runs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in environ.get(name, "").split(",")]
        counts = [int(run[1]) for run in runs if run is not None for _ in range(int(run[2] or 1))]
        if node < len(counts):
            return counts[node]
    return min(world_size, _integer(environ, "SLURM_NTASKS_PER_NODE", default=1))


def _size(environ: Mapping[str, str], rank: str, name: str) -> int:
    size = _integer(environ, name)
    if not size:
        found = f"{name}=0" if name in environ else f"no {name}"
        raise ValueError(f"{rank}={environ[rank]} but {found}; expected {name} to be the number of ranks")
    return size


def _integer(environ: Mapping[str, str], name: str, *, default: Any = None) -> Any:
    value = environ.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value!r}, expected an integer of 0 or more")
    return int(value)


def _meet_by_mpi(found: Rendezvous, timeout: timedelta | None) -> tuple[Any, Rendezvous]:
    """A store in rank 0, which listens before its port is told to anybody."""
    expected = "set MASTER_ADDR and MASTER_PORT to a host name and a free port of rank 0"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise ValueError(
            f"{found.launcher} started {found.world_size} ranks, but nothing says where rank 0 is; {expected}, "
            f"or install commq[mpi] ({error})"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (found.rank, found.world_size):
        raise ValueError(
            f"{found.launcher} started rank {found.rank} of {found.world_size}, but mpi4py sees rank "
            f"{world.Get_rank()} of {world.Get_size()}: it uses another MPI ({MPI.get_vendor()[0]}); {expected}, or "
            "install mpi4py for the MPI that starts the ranks"
        )
    limit = timeout or timedelta(seconds=300)
    one_host = len(set(world.allgather(MPI.Get_processor_name()))) == 1
    store, address, port, error_text = None, found.master_addr or socket.gethostname(), found.master_port or 0, ""
    if found.rank == 0:
        try:
            address = found.master_addr or ("127.0.0.1" if one_host else _own_address())
            store = _tcp_store(address, port, found.world_size, True, wait_for_workers=False, timeout=limit)
            port = store.port
        except (OSError, RuntimeError) as error:
            error_text = f"rank 0 cannot listen at {address}:{port} ({error}); {expected}"
    address, port, error_text = world.bcast((address, port, error_text))
    if error_text:
        raise ValueError(error_text)
    store = store or _tcp_store(address, port, found.world_size, False, timeout=limit)
    return store, replace(found, master_addr=address, master_port=port)


def _own_address() -> str:
    """An address of this host that others can reach: that of the interface that gloo is told to use, else that of the
    host's name, else, where the name stands for loopback or nothing, that of the default route. OSError without any.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        if interface:
            import fcntl  # not on Windows

            reply = fcntl.ioctl(datagrams, 0x8915, struct.pack("256s", interface.encode()))  # SIOCGIFADDR
            return socket.inet_ntoa(reply[20:24])
        with contextlib.suppress(OSError):
            address = socket.gethostbyname(socket.gethostname())
            if not address.startswith("127."):
                return address
        datagrams.connect(("192.0.2.1", 9))  # sends nothing, but chooses a route
        return str(datagrams.getsockname()[0])
