"""commq over MPI: the checks of mpi_program.py, which one mpiexec runs on four ranks."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpi_program import CHECKS, RANKS

LIMIT = 120  # seconds


def test_every_check_passes_on_four_ranks():
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpi4py")
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("needs mpiexec")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe"] if "Open MPI" in version or "OpenRTE" in version else []
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "OMPI_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    environ |= {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "MPIEXEC_TIMEOUT": str(LIMIT),
    }
    program = str(Path(__file__).with_name("mpi_program.py"))
    job = subprocess.run(
        [mpiexec, *options, "-n", str(RANKS), sys.executable, program],
        env=environ,
        capture_output=True,
        text=True,
        timeout=LIMIT + 30,
    )

    passed = [line.removeprefix("ok ") for line in job.stdout.splitlines() if line.startswith("ok ")]
    assert passed == list(CHECKS), f"failed: {list(CHECKS)[len(passed)]}\n{job.stdout}{job.stderr}"
    assert job.returncode == 0, job.stderr
