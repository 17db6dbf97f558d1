#!/usr/bin/env python3
"""MPI in a lab: mpiexec runs on host 0 and reaches the other hosts through this file, run in place of ssh.

Works for MPICH and its relatives (Hydra) and for Open MPI. All ranks really share one machine, so their
shared memory transports are switched off: what goes to another host has to cross its link.
"""

import ctypes
import os
import socket
import sys
from pathlib import Path

CLONE_NEWUTS = 0x04000000


def mpi_environment(folder: Path, addresses: list[str], ranks_per_host: int) -> dict[str, str]:
    """What mpiexec needs to know; host files go to `folder`."""
    hydra, openmpi = folder / "hosts.hydra", folder / "hosts.openmpi"
    hydra.write_text("".join(f"{address}:{ranks_per_host}\n" for address in addresses))
    openmpi.write_text("".join(f"{address} slots={ranks_per_host}\n" for address in addresses))
    agent = str(Path(__file__).resolve())
    return {
        "NETLAB_PYTHON": sys.executable,
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": agent,
        "HYDRA_HOST_FILE": str(hydra),
        "HYDRA_IFACE": "eth0",
        "MPIR_CVAR_NOLOCAL": "1",
        "UCX_TLS": "tcp",
        "FI_PROVIDER": "tcp",
        "PRTE_MCA_plm_ssh_agent": agent,
        "PRTE_MCA_prte_default_hostfile": str(openmpi),
        "PRTE_MCA_prte_if_include": "eth0",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self",
        "OMPI_MCA_btl_tcp_if_include": "eth0",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def main(arguments: list[str]) -> None:
    """As ssh: [options] address command..., in that host, with a host name of its own."""
    while arguments[0].startswith("-"):
        del arguments[0]
    host = int(arguments[0].rpartition(".")[2]) - 1
    ctypes.CDLL(None).unshare(CLONE_NEWUTS)
    socket.sethostname(f"host{host}")
    os.environ["NODE_RANK"] = os.environ["GROUP_RANK"] = str(host)
    os.environ["NCCL_HOSTID"] = f"{os.environ['NETLAB']}-{host}"
    python, lab = os.environ["NETLAB_PYTHON"], Path(__file__).with_name("netlab.py")
    os.execv(python, [python, str(lab), "ctl", "exec", str(host), "sh", "-c", " ".join(arguments[1:])])


if __name__ == "__main__":
    main(sys.argv[1:])
