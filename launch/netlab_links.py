"""The network of a lab: hosts as network namespaces, one bridge, one shaped link per host.

[Note: names] Whoever knows a lab's name can find its parts, change them and remove them:

    namespace netlab-NAME      the switch: bridge `br` with one port per host, `h0`, `h1`, ...
    namespace netlab-NAME-3    host 3: `eth0` = 10.77.0.4, the other end of `h3`; `lo` joins its own ranks
    folder /run/netlab-NAME    locked (flock) as long as the lab's process lives; there but free: left over

The switch has a namespace of its own, so the machine's firewall and network manager never see the lab,
nothing appears among the machine's interfaces, and all labs use the same addresses.
"""

import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

try:
    from pyroute2 import IPRoute, netns  # type: ignore[import-untyped]
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]
except ImportError:
    IPRoute = None

RUN = Path("/run")
NAMESPACES = Path("/var/run/netns")
NAME = re.compile(r"netlab-(\w+)(?:-\d+)?")
MAX_HOSTS = 254
MIN_RATE, MAX_RATE = 10**6, 34 * 10**9  # tbf holds bytes per second in 32 bits
UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
NETEM, TBF = 0x10000, 0x20000  # qdisc handles 1: and 2:
ROOT, BELOW_NETEM = 0xFFFFFFFF, 0x10001  # their places


class Unavailable(RuntimeError):
    """This machine cannot hold a lab; the message says why in one line."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that crossed a host's eth0, with headers once per packet the kernel hands over (up to 64 KiB)."""

    host: int
    sent: int
    received: int


def parse_rate(text: str) -> int:
    """'10gbit', '2.5gbit' or '500mbit' in bits per second; 0 for '0' and 'unshaped'."""
    if text in ("0", "unshaped"):
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if not match:
        raise ValueError(f"rate {text!r}: expected for example 10gbit, 500mbit or unshaped")
    rate = int(Decimal(match[1]) * UNITS[match[2]])
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"rate {text}: expected 1mbit to 34gbit, or unshaped")
    return rate


def parse_latency(text: str) -> int:
    """'5ms' or '200us' in microseconds."""
    match = re.fullmatch(r"(\d+)(us|ms)", text)
    if not match:
        raise ValueError(f"latency {text!r}: expected for example 5ms or 200us")
    return int(match[1]) * {"us": 1, "ms": 1000}[match[2]]


def burst(rate: int) -> int:
    """Bytes a link may send at once: 1/150 s of its rate, and always a few packets of 64 KiB."""
    return max(256 * 1024, rate // 8 // 150)


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def check_machine() -> None:
    if os.geteuid() != 0:
        raise Unavailable("needs root, to make network namespaces")
    if IPRoute is None:
        raise Unavailable("needs the pyroute2 package: pip install pyroute2")


def lab_names() -> list[str]:
    """Labs that run or were left over on this machine."""
    found = [*RUN.glob("netlab-*"), *NAMESPACES.glob("netlab-*")]
    return sorted({match[1] for path in found if (match := NAME.fullmatch(path.name))})


@contextmanager
def required(feature: str) -> Iterator[None]:
    try:
        yield
    except (OSError, NetlinkError) as error:
        raise Unavailable(f"this machine cannot make a {feature}: {error.args[-1]}") from error


class Network:
    """A lab's network, found by its name; see [Note: names]."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = RUN / f"netlab-{name}"
        self.switch = f"netlab-{name}"
        self._lock: int | None = None

    def host(self, host: int) -> str:
        return f"{self.switch}-{host}"

    def hosts(self) -> int:
        return len(self._namespaces(hosts_only=True))

    def _namespaces(self, hosts_only: bool) -> list[Path]:
        hosts = list(NAMESPACES.glob(f"{self.switch}-*"))
        return hosts if hosts_only else [*hosts, *NAMESPACES.glob(self.switch)]

    def claim(self) -> bool:
        """Take the name, until `remove` or the end of this process; False if a running lab has it."""
        with required(f"folder in {RUN}"):
            self.folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(self.folder)):
                self._lock = lock
                return True
        except (BlockingIOError, FileNotFoundError):  # its lab runs, or has just ended
            pass
        os.close(lock)
        return False

    def build(self, hosts: int, rate: int, latency: int) -> None:
        """rate: bits per second in each direction, 0 = unshaped; latency: microseconds one way, 0 = none."""
        with required("network namespace"):
            for name in (self.switch, *map(self.host, range(hosts))):
                netns.create(name)
        with self._links(self.switch) as switch:
            with required("bridge"):
                switch.link("add", ifname="br", kind="bridge")
            (bridge,) = switch.link_lookup(ifname="br")
            switch.link("set", index=bridge, state="up")
            for host in range(hosts):
                with required("veth pair"):
                    peer = {"ifname": "eth0", "net_ns_fd": self.host(host)}
                    switch.link("add", ifname=f"h{host}", kind="veth", peer=peer)
                (port,) = switch.link_lookup(ifname=f"h{host}")
                switch.link("set", index=port, master=bridge, state="up")
                with self._links(self.host(host)) as links:
                    (loopback,), (eth0,) = links.link_lookup(ifname="lo"), links.link_lookup(ifname="eth0")
                    links.addr("add", index=eth0, address=address(host), prefixlen=24)
                    links.link("set", index=loopback, state="up")
                    links.link("set", index=eth0, state="up")
                    if latency:
                        with required("netem queue (the kernel's sch_netem), which --latency needs"):
                            links.tc("add", "netem", eth0, handle=NETEM, delay=latency, limit=100_000)
        if rate:
            with required("tbf queue (the kernel's sch_tbf), which --rate needs"):
                self.set_rate(rate)

    def set_rate(self, rate: int) -> None:
        """Shape both ends of every link, so both directions, to `rate` bits per second."""
        with self._links(self.switch) as switch:
            for host in range(self.hosts()):
                _shape(switch, f"h{host}", rate)
                with self._links(self.host(host)) as links:
                    _shape(links, "eth0", rate)

    def cut(self, host: int) -> None:
        """Pull the host's cable: packets are lost in both directions, nobody is told."""
        self._set_port(host, "down")

    def restore(self, host: int) -> None:
        self._set_port(host, "up")

    def _set_port(self, host: int, state: str) -> None:
        with self._links(self.switch) as switch:
            (port,) = switch.link_lookup(ifname=f"h{host}")
            switch.link("set", index=port, state=state)

    def traffic(self) -> list[Traffic]:
        with self._links(self.switch) as switch:
            links = switch.get_links()
        stats = {link.get_attr("IFLA_IFNAME"): link.get_attr("IFLA_STATS64") for link in links}
        ports = [stats[f"h{host}"] for host in range(self.hosts())]  # what a port receives, its host has sent
        return [Traffic(host, port["rx_bytes"], port["tx_bytes"]) for host, port in enumerate(ports)]

    @contextmanager
    def inside(self, namespace: str) -> Iterator[None]:
        """Move the calling thread, and so the processes and sockets it makes, into a namespace."""
        with open("/proc/thread-self/ns/net") as home:
            netns.setns(namespace, flags=0)
            try:
                yield
            finally:
                netns.setns(home.fileno())

    @contextmanager
    def _links(self, namespace: str) -> Iterator["IPRoute"]:
        with self.inside(namespace):
            links = IPRoute()
        with links:
            yield links

    def processes(self, hosts_only: bool = False) -> set[int]:
        """All processes in the lab's namespaces, whoever started them."""
        ours = {(stat.st_dev, stat.st_ino) for stat in map(Path.stat, self._namespaces(hosts_only))}
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                stat = (process / "ns/net").stat()
                if (stat.st_dev, stat.st_ino) in ours:
                    found.add(int(process.name))
        return found - {os.getpid()}  # which may be in a namespace for the moment, see `inside`

    def kill(self, hosts_only: bool = False, grace: float = 3.0) -> None:
        """End all processes in the lab's namespaces: SIGTERM, after `grace` seconds SIGKILL.

        A process that ten seconds later still hangs in the kernel is left there.
        """
        asked: set[int] = set()
        start = time.monotonic()
        while (alive := self.processes(hosts_only)) and time.monotonic() < start + grace + 10:
            late = time.monotonic() > start + grace
            for pid in alive if late else alive - asked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            asked |= alive
            time.sleep(0.01)

    def clear(self) -> None:
        """End all processes, remove all namespaces and what the folder holds; only after `claim`."""
        self.kill()
        for path in self._namespaces(hosts_only=False):
            netns.remove(path.name)
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """`clear` and give the name back, if this process has claimed it."""
        if self._lock is not None:
            self.clear()
            self.folder.rmdir()
            os.close(self._lock)
            self._lock = None


def _shape(links: "IPRoute", interface: str, rate: int) -> None:
    (index,) = links.link_lookup(ifname=interface)
    queues = {queue.get_attr("TCA_KIND") for queue in links.get_qdiscs(index)}
    parent = BELOW_NETEM if "netem" in queues else ROOT
    if rate:
        limits = {"rate": rate // 8, "burst": burst(rate), "latency": "100ms"}  # latency: of a full queue
        links.tc("replace", "tbf", index, handle=TBF, parent=parent, **limits)
    elif "tbf" in queues:
        links.tc("del", index=index, handle=TBF, parent=parent)
