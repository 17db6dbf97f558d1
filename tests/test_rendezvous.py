"""Which rank a process is, by the environments that launchers make; and the process groups made from them."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from commq.collectives.rendezvous import Rendezvous, find_rendezvous, first_host, init_process_group

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "6", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
BATCH = {  # in the shell of sbatch
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[003-005,9]",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
}
SRUN = BATCH | {"SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
PORT = 10_000 + (4711 * 31 + 2) % 20_000


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": " "}, None),
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, None),  # the shell of salloc
        (TORCHRUN, Rendezvous(5, 8, 1, 4, "node7", 29500, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "2"}, Rendezvous(0, 2, launcher="torchrun")),
        (OPEN_MPI, Rendezvous(3, 4, 1, 2, launcher="Open MPI")),
        (OPEN_MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, Rendezvous(3, 4, 1, 2, "a", 1, "Open MPI")),
        (OPEN_MPI | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Rendezvous(3, 4, 0, 1, launcher="Open MPI")),
        (OPEN_MPI | {"WORLD_SIZE": "4"}, Rendezvous(3, 4, 1, 2, launcher="Open MPI")),
        (MPICH, Rendezvous(2, 6, 0, 2, launcher="MPICH")),
        ({"PMI_RANK": "2", "PMI_SIZE": "6"}, Rendezvous(2, 6, launcher="MPICH")),
        (  # Cray
            {"PMI_RANK": "2", "PMI_SIZE": "6", "PMI_LOCAL_RANK": "2", "PMI_LOCAL_SIZE": "3"},
            Rendezvous(2, 6, 2, 3, launcher="MPICH"),
        ),
        ({"PMIX_RANK": "1", "WORLD_SIZE": "3"}, Rendezvous(1, 3, launcher="PMIx")),
        (SRUN, Rendezvous(5, 7, 1, 2, "gpu003", PORT, "srun")),
        (
            SRUN | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"},
            Rendezvous(6, 7, 0, 1, "gpu003", PORT, "srun"),
        ),
        (SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, Rendezvous(5, 7, 1, 2, "a", 1, "srun")),
        # A step of fewer tasks on fewer hosts than the job's.
        (
            SRUN
            | {
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_STEP_NODELIST": "gpu[004,9]",
                "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
                "SLURM_NODEID": "1",
                "SLURM_LOCALID": "2",
            },
            Rendezvous(5, 6, 2, 3, "gpu004", PORT, "srun"),
        ),
        (
            {name: value for name, value in SRUN.items() if name not in ("SLURM_TASKS_PER_NODE", "SLURM_JOB_ID")}
            | {"SLURM_NTASKS_PER_NODE": "4"},
            Rendezvous(5, 7, 1, 4, "gpu003", None, "srun"),
        ),
        # srun --mpi=pmi2 and --mpi=pmix
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, Rendezvous(5, 7, 1, 2, "gpu003", PORT, "srun")),
        (SRUN | {"PMIX_RANK": "5"}, Rendezvous(5, 7, 1, 2, "gpu003", PORT, "srun")),
        # One launcher within the other: the inner one started the ranks.
        (BATCH | MPICH, Rendezvous(2, 6, 0, 2, launcher="MPICH")),
        (SRUN | MPICH, Rendezvous(2, 6, 0, 2, launcher="MPICH")),  # Hydra's proxies are started by srun
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "6"}, Rendezvous(2, 6, launcher="MPICH")),
        (SRUN | OPEN_MPI, Rendezvous(3, 4, 1, 2, launcher="Open MPI")),
        (BATCH | TORCHRUN, Rendezvous(5, 8, 1, 4, "node7", 29500, "torchrun")),
        (SRUN | OPEN_MPI | MPICH | TORCHRUN, Rendezvous(5, 8, 1, 4, "node7", 29500, "torchrun")),
    ],
)
def test_the_environment_says_which_rank_this_is(environ, expected):
    assert find_rendezvous(environ) == expected


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "RANK=0 but no WORLD_SIZE; expected WORLD_SIZE to be the number of ranks"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 but WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but nothing says which rank this is; expected RANK"),
        (TORCHRUN | {"RANK": "8"}, "torchrun: rank 8 of 8, expected 0 to 7"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "torchrun: local rank 4 of 4, expected 0 to 3"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this machine, expected at most all 8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1', expected an integer of 0 or more"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http', expected an integer"),
        (OPEN_MPI | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but Open MPI started 4 ranks; unset WORLD_SIZE"),
        ({"PMI_RANK": "1"}, "PMI_RANK=1 but no PMI_SIZE"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 but no WORLD_SIZE"),
        (SRUN | {"SLURM_JOB_NODELIST": "gpu[003"}, "node list 'gpu[003' is not in SLURM's notation"),
        (SRUN | {"SLURM_LOCALID": "2"}, "srun: local rank 2 of 2, expected 0 to 1"),
    ],
)
def test_contradictions_say_what_was_found_and_what_was_expected(environ, says):
    with pytest.raises(ValueError) as raised:
        find_rendezvous(environ)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[003-005,9]", "gpu003"),
        ("gpu[9,003-005],cpu1", "gpu9"),
        ("rack[1-2]n[03,5]", "rack1n03"),
        ("rack1-gpu[3-4].site,x", "rack1-gpu3.site"),
        ("x,gpu[3-4]", "x"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "gpu[", "gpu[]", "gpu[3", "gpu]3", ",a", "gpu[-3]"])
def test_what_is_no_node_list_is_refused(nodelist):
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host(nodelist)


def test_steps_and_jobs_that_share_a_host_have_ports_of_their_own():
    jobs = [SRUN | {"SLURM_JOB_ID": str(4711 + i), "SLURM_STEP_ID": str(j)} for i in range(50) for j in range(20)]
    ports = [find_rendezvous(job).master_port for job in jobs]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


@pytest.fixture
def environ(monkeypatch):
    """Only these of the launchers' variables; as they were afterwards."""

    def put(variables):
        for name in list(os.environ):
            if name in TORCHRUN or name.startswith(("OMPI_", "PMI", "SLURM_", "MPI_LOCAL")):
                monkeypatch.delenv(name)
        for name in {*TORCHRUN, *variables}:
            monkeypatch.setenv(name, variables.get(name, ""))
            if name not in variables:
                monkeypatch.delenv(name)

    yield put
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("variables", "exported"),
    [
        ({}, {}),
        (
            SRUN
            | {
                "SLURM_NTASKS": "1",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_TASKS_PER_NODE": "1",
                "SLURM_NODEID": "0",
            },
            {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "gpu003",
                "MASTER_PORT": str(PORT),
            },
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}),
        (
            OPEN_MPI
            | {
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_SIZE": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            {"RANK": "0", "WORLD_SIZE": "1"},
        ),
    ],
    ids=["no launcher", "srun -n 1", "without MASTER_ADDR", "mpirun -n 1"],
)
def test_alone_no_address_is_needed(environ, variables, exported):
    environ(variables)
    found = init_process_group("gloo")
    assert (found.rank, found.world_size) == (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert {name: os.environ.get(name) for name in exported} == exported
    assert exported or not set(TORCHRUN) & set(os.environ)


RANK = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch.distributed as dist
from commq.collectives.rendezvous import init_process_group
found = init_process_group("gloo")
total = torch.tensor([found.rank + 1])
dist.all_reduce(total)
print(json.dumps([found.launcher, int(total), os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"]]))
dist.destroy_process_group()
"""


def test_two_tasks_of_srun_meet():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {name: value for name, value in SRUN.items() if name != "SLURM_NODEID"} | {
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(store.port),  # that of a store that is there, so that no other job can take it
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    clean = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(sys.path)],
            env=clean | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=60)
        assert json.loads(output) == ["srun", 3, str(rank), str(store.port)]


def test_without_mpi4py_it_says_what_to_set(environ, monkeypatch):
    environ(MPICH)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"MPICH started 6 ranks.*set MASTER_ADDR and MASTER_PORT.*install commq"):
        init_process_group("gloo")
    assert "RANK" not in os.environ


def test_an_mpi4py_of_another_mpi_is_an_error(environ, monkeypatch):
    environ(MPICH)
    world = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1)
    mpi = SimpleNamespace(COMM_WORLD=world, get_vendor=lambda: ("Open MPI", (5, 0, 0)))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    with pytest.raises(ValueError, match=r"started rank 2 of 6, but mpi4py sees rank 0 of 1: .*\(Open MPI\)"):
        init_process_group("gloo")
