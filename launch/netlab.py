"""A cluster in one box: hosts as network namespaces, joined by links of a chosen speed.

    python launch/netlab.py --hosts 4 --ranks-per-host 1 --rate 10gbit -- python script.py ...
    python launch/netlab.py --hosts 2 --ranks-per-host 4 --rate 1gbit --per-host -- torchrun --nnodes {hosts}
        --node-rank {node_rank} --nproc-per-node {ranks_per_host} --master-addr {master_addr}
        --master-port {master_port} script.py ...
    python launch/netlab.py --hosts 4 --rate 1gbit --mpi -- mpiexec -n 4 python script.py ...
    python launch/netlab.py ctl cut 2      # or: restore 2, rate 1gbit, traffic, exec 2 ping 10.77.0.1
    python launch/netlab.py --clean        # remove what a lab ended by SIGKILL has left behind

Every link has the given rate in each direction; ranks of one host meet over loopback, which is not slowed.
Ranks get the variables that torchrun sets, so `init_process_group()` needs no arguments, and NETLAB, the
lab's name. The bytes that crossed each host's link are printed at the end; while it runs, a rank finds those
of its own host in /proc/net/dev (eth0).

The machine's GPUs are dealt out to the hosts. With fewer GPUs than ranks they are shared, through NVIDIA MPS
where it is installed; scripts then choose device LOCAL_RANK % torch.cuda.device_count(). Under torchrun,
ranks of one host cannot share a GPU. CUDA_VISIBLE_DEVICES="" keeps GPUs out.

Exit code: 0, or that of the first rank that failed (128 + n for signal n), which ends the others; 2 for wrong
arguments; 3, with the reason in one line, if this machine cannot hold a lab (no root, a kernel without tbf).

From Python, for fault tests:

    with Lab(hosts=4, ranks_per_host=2, rate="1gbit") as lab:
        job = lab.start(["python", "script.py"])
        lab.cut(2)
        lab.restore(2)
        lab.set_rate("500mbit")
        code = job.wait()
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Literal, NoReturn

from netlab_links import (
    MAX_HOSTS,
    Network,
    Traffic,
    Unavailable,
    address,
    check_machine,
    lab_names,
    parse_latency,
    parse_rate,
)
from netlab_mpi import mpi_environment
from netlab_mps import Mps, gpus, mps_program
from netlab_ranks import Job, Task

PORT = 29500  # free in every lab: its hosts' ports are their own
Unit = Literal["rank", "host", "lab"]
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Lab:
    """A lab that lives as long as the `with` block: leaving it ends every process inside.

    rate: of each link and direction, "10gbit", "500mbit" or "unshaped".
    latency: one way between hosts, "5ms" or "200us"; needs a kernel with netem.
    name: by default the first free one of lab0, lab1, ...
    """

    def __init__(
        self,
        hosts: int,
        ranks_per_host: int = 1,
        rate: str = "unshaped",
        latency: str = "0ms",
        name: str = "",
    ) -> None:
        if not 1 <= hosts <= MAX_HOSTS or ranks_per_host < 1:
            found = f"{hosts} hosts x {ranks_per_host} ranks"
            raise ValueError(f"{found}: expected 1 to {MAX_HOSTS} hosts and at least 1 rank")
        if not re.fullmatch(r"\w*", name, re.ASCII):
            raise ValueError(f"lab name {name!r}: expected letters, digits and _")
        self.hosts, self.ranks_per_host, self.name = hosts, ranks_per_host, name
        self.rate, self.latency = parse_rate(rate), parse_latency(latency)
        self.network = Network(name)
        self.gpus = gpus()
        self._mps: Mps | None = None

    def __enter__(self) -> "Lab":
        check_machine()
        try:
            with _uninterrupted():
                self._claim()
                self.network.clear()  # a lab of this name that was ended by SIGKILL
                self.network.build(self.hosts, self.rate, self.latency)
            self._start_mps()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with _uninterrupted():
            if self._mps:
                self.network.kill(hosts_only=True)
                self._mps.quit()
            self.network.remove()

    def _claim(self) -> None:
        if self.name:
            if not self.network.claim():
                raise ValueError(f"lab {self.name} runs already")
            return
        for number in count():
            self.network = Network(f"lab{number}")
            if self.network.claim():
                self.name = self.network.name
                return

    def _start_mps(self) -> None:
        program = mps_program()
        if program and 0 < len(self.gpus) < self.hosts * self.ranks_per_host:
            self._mps = Mps(program, self.network.folder)
            with self.network.inside(self.network.switch):
                if not self._mps.start():
                    _say("NVIDIA MPS does not start; ranks that share a GPU take turns")

    def start(self, command: list[str], *, once_per: Unit = "rank", quiet_others: bool = False) -> Job:
        """Start `command` in every rank; or on every host, with {node_rank}, {hosts}, {ranks_per_host},
        {master_addr} and {master_port} filled in; or once per lab, an mpiexec on host 0.
        """
        if self.network.processes(hosts_only=True):
            raise RuntimeError(f"lab {self.name} still runs processes; it takes one command at a time")
        tasks = {"rank": self._rank_tasks, "host": self._host_tasks, "lab": self._mpi_tasks}[once_per]
        return Job(self.network, tasks(command), quiet_others)

    def run(self, command: list[str], *, once_per: Unit = "rank", quiet_others: bool = False) -> int:
        """`start`, wait for the end, and return the exit code; see `Job.wait`."""
        return self.start(command, once_per=once_per, quiet_others=quiet_others).wait()

    def cut(self, host: int) -> None:
        """Pull the host's cable: packets are lost in both directions and nobody is told."""
        self.network.cut(host)

    def restore(self, host: int) -> None:
        self.network.restore(host)

    def set_rate(self, rate: str) -> None:
        self.network.set_rate(parse_rate(rate))

    def traffic(self) -> list[Traffic]:
        """Bytes over each host's link since the lab was built."""
        return self.network.traffic()

    def _rank_tasks(self, command: list[str]) -> list[Task]:
        world = self.hosts * self.ranks_per_host
        tasks = []
        for rank in range(world):
            host, local = divmod(rank, self.ranks_per_host)
            environment = self._environment(host) | {
                "RANK": str(rank),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(self.ranks_per_host),
            }
            if 0 < len(self.gpus) < self.ranks_per_host:  # NCCL refuses two ranks of one host on the same GPU
                environment["NCCL_HOSTID"] += f"-{local}"
            tasks.append(Task(f"rank {rank} (host {host})", host, command, environment))
        return tasks

    def _host_tasks(self, command: list[str]) -> list[Task]:
        tasks = []
        for host in range(self.hosts):
            values = {
                "{node_rank}": str(host),
                "{hosts}": str(self.hosts),
                "{ranks_per_host}": str(self.ranks_per_host),
                "{master_addr}": address(0),
                "{master_port}": str(PORT),
            }
            filled = command
            for name, value in values.items():
                filled = [word.replace(name, value) for word in filled]
            tasks.append(Task(f"host {host}", host, filled, self._environment(host)))
        return tasks

    def _mpi_tasks(self, command: list[str]) -> list[Task]:
        addresses = [address(host) for host in range(self.hosts)]
        mpi = mpi_environment(self.network.folder, addresses, self.ranks_per_host)
        return [Task(command[0], 0, command, self._environment(0) | mpi)]

    def _environment(self, host: int) -> dict[str, str]:
        environment = (
            {"OMP_NUM_THREADS": "1"}
            | os.environ
            | {
                "NETLAB": self.name,
                "NODE_RANK": str(host),
                "GROUP_RANK": str(host),
                "MASTER_ADDR": address(0),
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": "eth0",
                "TP_SOCKET_IFNAME": "eth0",
                "NCCL_SOCKET_IFNAME": "eth0",
                "NCCL_IB_DISABLE": "1",
                "NCCL_HOSTID": f"{self.name}-{host}",
                "PYTHONUNBUFFERED": "1",
            }
        )
        if len(self.gpus) > 1:
            first = host * self.ranks_per_host
            turns = (self.gpus[(first + local) % len(self.gpus)] for local in range(self.ranks_per_host))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(turns))
        return environment | (self._mps.environment if self._mps else {})


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM while the network is built or removed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(arguments: list[str]) -> int:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _stop)
    try:
        if arguments[:1] == ["ctl"]:
            return _control(arguments[1:])
        return _launch(arguments)
    except Unavailable as error:
        _say(str(error))
        return 3
    except ValueError as error:
        _say(str(error))
        return 2


def _stop(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _launch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="netlab.py",
        usage="%(prog)s [options] -- command ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hosts", type=int, default=2)
    add("--ranks-per-host", type=int, default=1)
    add("--rate", default="unshaped", help="of each link and direction: 10gbit, 500mbit, unshaped")
    add("--latency", default="0ms", help="one way between hosts: 5ms, 200us; needs a kernel with netem")
    add("--per-host", dest="once_per", action="store_const", const="host", help="the command is torchrun")
    add("--mpi", dest="once_per", action="store_const", const="lab", help="the command is mpiexec")
    add("--lab", default="", metavar="NAME", help="default: the first free one of lab0, lab1, ...")
    add("--quiet-others", action="store_true", help="print the output of rank 0 only")
    add("--json", type=Path, metavar="FILE", help="write the bytes of each link to FILE")
    add("--clean", action="store_true", help="remove what is left of labs that no longer run")
    parser.set_defaults(once_per="rank")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if options.clean:
        return _clean()
    if not command:
        parser.error("no command; give it after --")

    with Lab(options.hosts, options.ranks_per_host, options.rate, options.latency, options.lab) as lab:
        _say(f"{lab.name}: {lab.hosts} hosts x {lab.ranks_per_host} ranks, links {options.rate}")
        start = time.monotonic()
        try:
            code = lab.run(command, once_per=options.once_per, quiet_others=options.quiet_others)
        except (FileNotFoundError, PermissionError) as error:
            _say(f"cannot start {command[0]}: {error.strerror}")
            return 127
        seconds = time.monotonic() - start
        traffic = lab.traffic()
    for link in traffic:
        _say(f"{lab.name}: host {link.host} sent {link.sent:,} bytes, received {link.received:,}")
    if options.json:
        report = {
            "hosts": lab.hosts,
            "ranks_per_host": lab.ranks_per_host,
            "rate_bits_per_second": lab.rate,
            "latency_us": lab.latency,
            "seconds": seconds,
            "exit_code": code,
            "links": [asdict(link) for link in traffic],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return code


def _clean() -> int:
    check_machine()
    for network in map(Network, lab_names()):
        if network.claim():
            with _uninterrupted():
                network.remove()
            _say(f"removed {network.name}")
    return 0


def _control(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="netlab.py ctl", description="Change a lab while it runs.")
    lab = os.environ.get("NETLAB", "lab0")
    parser.add_argument("--lab", default=lab, metavar="NAME", help="default: $NETLAB, or lab0")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("cut", help="pull a host's cable").add_argument("host", type=int)
    actions.add_parser("restore", help="plug it in again").add_argument("host", type=int)
    actions.add_parser("rate", help="set the rate of all links").add_argument("rate")
    actions.add_parser("traffic", help="print the bytes of each host's link as JSON")
    execute = actions.add_parser("exec", help="run a command, by default a shell, inside a host")
    execute.add_argument("host", type=int)
    execute.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)

    check_machine()
    network = Network(options.lab)
    hosts = network.hosts()
    if not hosts:
        raise ValueError(f"no lab {options.lab}; there are: {', '.join(lab_names()) or 'none'}")
    if not 0 <= getattr(options, "host", 0) < hosts:
        raise ValueError(f"no host {options.host} in {options.lab}: it has 0 to {hosts - 1}")
    match options.action:
        case "cut":
            network.cut(options.host)
        case "restore":
            network.restore(options.host)
        case "rate":
            network.set_rate(parse_rate(options.rate))
        case "traffic":
            print(json.dumps([asdict(link) for link in network.traffic()]))
        case "exec":
            command = options.command or ["sh"]
            with network.inside(network.host(options.host)):
                os.execvp(command[0], command)
    return 0


def _say(text: str) -> None:
    print(f"netlab: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
