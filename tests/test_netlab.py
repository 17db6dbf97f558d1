"""The network lab, in real namespaces; skipped, with its own reason, where a machine cannot hold one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))

from netlab import Lab  # noqa: E402
from netlab_links import NAMESPACES, RUN, Unavailable, burst, parse_latency, parse_rate  # noqa: E402

NETLAB = [sys.executable, str(LAUNCH / "netlab.py")]
MIB = 1 << 20


def netlab(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*NETLAB, *arguments], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


@contextmanager
def running_lab(name: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A lab of two hosts, ended by SIGTERM if it does not end by itself."""
    arguments = [*NETLAB, "--lab", name, "--rate", "1gbit", "--", *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as lab:
        try:
            yield lab
        finally:
            lab.terminate()


def traces(name: str) -> list[Path]:
    return [path for folder in (RUN, NAMESPACES) for path in folder.glob(f"netlab-{name}*")]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/ns/net").exists()  # not so for a zombie


@pytest.fixture(scope="session")
def lab_machine() -> None:
    probe = netlab("--hosts", "2", "--rate", "1gbit", "--", "true")
    if probe.returncode == 3:
        pytest.skip(probe.stderr.strip())
    assert probe.returncode == 0, probe.stderr


@pytest.fixture
def name(lab_machine: None) -> Iterator[str]:
    """A lab's name; afterwards nothing of that lab may be left."""
    interfaces = set(os.listdir("/sys/class/net"))
    name = f"test_{uuid.uuid4().hex[:8]}"
    yield name
    assert traces(name) == []
    assert set(os.listdir("/sys/class/net")) == interfaces


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10gbit", 10**10),
        ("2.5gbit", 25 * 10**8),
        ("500mbit", 5 * 10**8),
        ("1000kbit", 10**6),
        ("0", 0),
        ("unshaped", 0),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "10", "10gbps", "-1gbit", "1 gbit", "gbit", "1kbit", "100gbit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_rate(text)


def test_latencies() -> None:
    assert [parse_latency(text) for text in ("0ms", "5ms", "200us")] == [0, 5000, 200]
    with pytest.raises(ValueError, match="expected"):
        parse_latency("5")


def test_burst() -> None:
    assert burst(parse_rate("10mbit")) == 256 * 1024
    assert burst(parse_rate("15gbit")) == 15 * 10**9 / 8 / 150


def test_a_host_per_rank_or_a_gpu_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def environments(gpus: str) -> list[dict[str, str]]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        lab = Lab(hosts=2, ranks_per_host=2, name="x")
        return [task.environment for task in lab._rank_tasks(["true"])]

    variables = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    found = [[environment[variable] for variable in variables] for environment in environments("")]
    assert found == [list("00042"), list("11042"), list("20142"), list("31142")]

    def nccl_hosts(gpus: str) -> list[str]:
        return [environment["NCCL_HOSTID"] for environment in environments(gpus)]

    assert nccl_hosts("") == nccl_hosts("0,1") == ["x-0", "x-0", "x-1", "x-1"]
    assert nccl_hosts("0") == ["x-0-0", "x-0-1", "x-1-0", "x-1-1"]  # NCCL wants one rank of a host per GPU

    dealt = [environment["CUDA_VISIBLE_DEVICES"] for environment in environments("4,5,6,7")]
    assert dealt == ["4,5", "4,5", "6,7", "6,7"]


def test_the_command_of_a_host() -> None:
    command = ["torchrun", "{hosts}", "{node_rank}", "{master_addr}:{master_port}", "{ranks_per_host}", "{x}"]
    tasks = Lab(hosts=2, ranks_per_host=4)._host_tasks(command)
    assert tasks[1].command == ["torchrun", "2", "1", "10.77.0.1:29500", "4", "{x}"]
    assert tasks[1].environment["NODE_RANK"] == "1"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hosts": 1, "rate": "fast"}, "rate 'fast': expected"),
        ({"hosts": 0}, "0 hosts x 1 ranks: expected"),
        ({"hosts": 1, "ranks_per_host": 0}, "1 hosts x 0 ranks: expected"),
        ({"hosts": 1, "name": "a-b"}, "lab name 'a-b': expected"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lab(**wrong)


def test_wrong_arguments_on_the_command_line() -> None:
    result = netlab("--rate", "fast", "--", "true")
    assert result.returncode == 2
    assert result.stderr == "netlab: rate 'fast': expected for example 10gbit, 500mbit or unshaped\n"


def test_without_root() -> None:
    script = "import os, sys, netlab; os.geteuid = lambda: 1; sys.exit(netlab.main(['--', 'true']))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=LAUNCH, capture_output=True, text=True, timeout=60)
    assert result.returncode == 3
    assert result.stderr == "netlab: needs root, to make network namespaces\n"


def test_latency_or_the_reason_why_not(name: str) -> None:
    try:
        with Lab(hosts=2, latency="5ms", name=name) as lab:
            assert lab.run(["true"]) == 0
    except Unavailable as reason:
        assert "netem" in str(reason)


EXCHANGE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
total = torch.tensor([2.0 ** rank])
dist.all_reduce(total)
assert total.item() == 2 ** world - 1, total
sent = torch.full((world * 8 << 20,), rank, dtype=torch.uint8)
received = torch.empty_like(sent)
dist.all_to_all_single(received, sent)
assert received.view(world, -1)[:, -1].tolist() == list(range(world))
print("sum", int(total.item()))
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_meet_and_their_bytes_are_counted(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--lab", name, "--hosts", "3", "--rate", "1gbit", "--json", str(report)]
    result = netlab(*options, "--", sys.executable, "-c", EXCHANGE)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["[0] sum 7", "[1] sum 7", "[2] sum 7"]
    content = json.loads(report.read_text())
    assert (content["rate_bits_per_second"], content["exit_code"]) == (10**9, 0)
    payload = 16 * MIB  # to and from the two other hosts
    for host, link in enumerate(content["links"]):
        assert link["host"] == host
        assert payload <= link["sent"] <= 1.1 * payload
        assert payload <= link["received"] <= 1.1 * payload


def test_two_labs_side_by_side(name: str, tmp_path: Path) -> None:
    """Their hosts have the same addresses and ports, and meet only their own lab's."""
    script = f"""
import os, pathlib, socket, time
folder, me = pathlib.Path({str(tmp_path)!r}), os.environ["NETLAB"] + os.environ["RANK"]
if os.environ["RANK"] == "0":
    server = socket.create_server(("10.77.0.1", 5000))
(folder / me).touch()
while len(os.listdir(folder)) < 4:
    time.sleep(0.01)
if os.environ["RANK"] == "0":
    peer, _ = server.accept()
else:
    peer = socket.create_connection(("10.77.0.1", 5000), timeout=20)
peer.sendall(os.environ["NETLAB"].encode())
peer.shutdown(socket.SHUT_WR)
print(peer.makefile().read())
"""
    command = [sys.executable, "-c", script]
    other = f"{name}_too"
    with running_lab(name, *command) as lab, running_lab(other, *command) as other_lab:
        assert sorted(lab.communicate(timeout=40)[0].splitlines()) == [f"[0] {name}", f"[1] {name}"]
        assert sorted(other_lab.communicate(timeout=40)[0].splitlines()) == [f"[0] {other}", f"[1] {other}"]
    assert (lab.returncode, other_lab.returncode) == (0, 0)


def test_a_name_is_taken_once(name: str) -> None:
    with Lab(hosts=1, name=name), pytest.raises(ValueError, match="runs already"), Lab(hosts=1, name=name):
        pass


def test_a_failed_rank_ends_the_lab(name: str) -> None:
    script = "[ $RANK = 1 ] && { echo reason >&2; exit 7; }; exec sleep 600"
    result = netlab("--lab", name, "--hosts", "3", "--quiet-others", "--", "sh", "-c", script)
    assert result.returncode == 7
    assert "rank 1 (host 1) failed with exit code 7; ending the other 2" in result.stderr
    assert "[1] reason" in result.stderr


def test_a_signal_that_ends_a_rank_is_shown(name: str) -> None:
    result = netlab("--lab", name, "--hosts", "1", "--", "sh", "-c", "kill -KILL $$")
    assert result.returncode == 128 + signal.SIGKILL
    assert "rank 0 (host 0) failed with SIGKILL" in result.stderr


# The child has a session of its own: only its namespace leads to it.
BACKGROUND = "setsid sleep 600 & echo $! $$; wait"


def pids_printed(lab: subprocess.Popen[str]) -> list[int]:
    assert lab.stdout
    return [int(pid) for _ in range(2) for pid in lab.stdout.readline().split()[1:]]


@pytest.mark.parametrize(
    ("number", "script"),
    [(signal.SIGINT, BACKGROUND), (signal.SIGTERM, f'trap "" TERM; {BACKGROUND}')],
    ids=["ctrl-c", "stubborn ranks"],
)
def test_signals_end_the_lab(name: str, number: signal.Signals, script: str) -> None:
    with running_lab(name, "sh", "-c", script) as lab:
        pids = pids_printed(lab)
        assert all(map(is_alive, pids))
        lab.send_signal(number)
        assert lab.wait(timeout=30) == 128 + number
    assert not any(map(is_alive, pids))


def test_clean_removes_what_a_killed_lab_left(name: str) -> None:
    with running_lab(name, "sh", "-c", BACKGROUND) as lab:
        pids = pids_printed(lab)
        assert name not in netlab("--clean").stderr
        lab.kill()
    assert all(map(is_alive, pids))
    assert f"netlab: removed {name}" in netlab("--clean").stderr
    assert not any(map(is_alive, pids))


# Rank 1 sends numbers that rank 0 returns; it cuts, restores and slows its lab by itself.
FAULTS = f"""
import json, os, socket, subprocess, sys, time
def control(*arguments):
    return subprocess.run({NETLAB!r} + ["ctl", *arguments], check=True, capture_output=True, text=True).stdout
if os.environ["RANK"] == "0":
    peer, _ = socket.create_server(("10.77.0.1", 5000)).accept()
    while data := peer.recv(1 << 16):
        peer.sendall(data)
    sys.exit()
deadline = time.monotonic() + 20
while True:
    try:
        peer = socket.create_connection(("10.77.0.1", 5000), timeout=20)
        break
    except ConnectionRefusedError:
        assert time.monotonic() < deadline
        time.sleep(0.01)
peer.sendall(b"a")
assert peer.recv(1) == b"a"
control("cut", "0")
peer.settimeout(0.3)
peer.sendall(b"b")
try:
    peer.recv(1)
    sys.exit("the cut link still works")
except TimeoutError:
    print("timeout")
control("restore", "0")
peer.settimeout(20)
assert peer.recv(1) == b"b"
control("rate", "unshaped")
control("rate", "2gbit")
peer.sendall(bytes(100_000))
left = 100_000
while left:
    left -= len(peer.recv(left))
print("healed", json.loads(control("traffic"))[1]["sent"] >= 100_000)
"""


def test_a_cut_link_times_out_and_a_restored_one_heals(name: str) -> None:
    result = netlab("--lab", name, "--rate", "1gbit", "--", sys.executable, "-c", FAULTS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[1] timeout", "[1] healed True"]


def test_control_names_what_is_wrong(name: str) -> None:
    result = netlab("ctl", "--lab", name, "cut", "0")
    assert (result.returncode, f"no lab {name}" in result.stderr) == (2, True)
    with Lab(hosts=1, name=name):
        result = netlab("ctl", "--lab", name, "cut", "1")
        assert (result.returncode, "it has 0 to 0" in result.stderr) == (2, True)


def test_from_python(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Lab(hosts=2, rate="1gbit", name=name) as lab:
        job = lab.start(["sleep", "600"])
        with pytest.raises(TimeoutError, match="2 processes still run"):
            job.wait(timeout=0.1)
        with pytest.raises(RuntimeError, match="one command at a time"):
            lab.run(["true"])
        lab.cut(1)
        lab.restore(1)
        lab.set_rate("unshaped")
        lab.network.kill(hosts_only=True)
        assert job.wait(timeout=20) == 128 + signal.SIGTERM
        assert lab.run(["sh", "-c", "exit $RANK"]) == 1
        assert lab.run(["sh", "-c", "echo host {node_rank} of {hosts}"], once_per="host") == 0
        assert [link.host for link in lab.traffic()] == [0, 1]
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] host 0 of 2", "[1] host 1 of 2"]


def test_mps_is_started_and_quit_when_a_gpu_is_shared(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(f'#!/bin/sh\necho "$1" $(cat) $CUDA_MPS_PIPE_DIRECTORY >> {log}\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = f"echo rank $CUDA_MPS_PIPE_DIRECTORY >> {log}"
    pipe = RUN / f"netlab-{name}" / "mps"
    pipe.mkdir(parents=True)  # as a killed lab leaves it
    for gpus in ("0,1", "0"):  # with a GPU for each rank there is nothing to share
        result = netlab("--lab", name, "--", "sh", "-c", script, PATH=path, CUDA_VISIBLE_DEVICES=gpus)
        assert result.returncode == 0, result.stderr
    lines = ["rank", "rank", f"-d {pipe}", f"rank {pipe}", f"rank {pipe}", f"quit {pipe}"]
    assert [line.strip() for line in log.read_text().splitlines()] == lines


def test_mpiexec(name: str) -> None:
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not mpiexec:
        pytest.skip("no mpiexec here")
    pytest.importorskip("mpi4py")
    script = """
from mpi4py import MPI
ranks = MPI.COMM_WORLD
received = ranks.sendrecv(bytes(1 << 20), 1 - ranks.rank, source=1 - ranks.rank)
ranks.Barrier()  # what the other one has received, this one has sent
sent = next(line.split()[9] for line in open("/proc/net/dev") if "eth0" in line)
assert len(received) == 1 << 20 <= int(sent), sent
"""
    command = [mpiexec, "-n", "2", sys.executable, "-c", script]
    result = netlab("--lab", name, "--rate", "1gbit", "--mpi", "--", *command)
    assert result.returncode == 0, result.stderr
