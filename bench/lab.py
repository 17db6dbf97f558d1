"""A rank's view of the lab it runs in (launch/netlab.py): its link's bytes and rate."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "launch"))


def link_bytes() -> int:
    """Bytes that this host's link has carried away so far, headers included; 0 outside a lab."""
    for line in Path("/proc/net/dev").read_text().splitlines() if "NETLAB" in os.environ else ():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    return 0


def set_rate(rate: str) -> None:
    """Change the rate of all links: "10gbit", "500mbit", "unshaped". One rank does it, which needs root.

    ValueError outside a lab, where links are what they are, for any rate but "unshaped".
    """
    from netlab_links import Network, parse_rate

    if "NETLAB" not in os.environ:
        if rate != "unshaped":
            raise ValueError(f"rate {rate!r}: not in a lab, where links cannot be shaped; expected unshaped")
        return
    Network(os.environ["NETLAB"]).set_rate(parse_rate(rate))


def write_rows(out: Path, found: object) -> None:
    """A worker's rows so far, all or nothing of them: it may be cut off at any time."""
    new = Path(f"{out}.new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(out)


def gbit(rate: str) -> float:
    """Gbit/s of a rate; 0.0 if it is unshaped."""
    from netlab_links import parse_rate

    return parse_rate(rate) / 1e9


def drive(script: Path, args: argparse.Namespace) -> None:
    """Run `script` as a worker of each rank, for each number of hosts and each rate; all rows go to args.out."""
    from netlab import Lab
    from timing import environment

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the lab, too
    rows, part = [], Path(f"{args.out}.part")
    found = environment(args.device)
    part.unlink(missing_ok=True)
    for hosts in map(int, args.hosts.split(",")):
        for rate in args.rates.split(","):
            code = 1
            try:
                with Lab(hosts=hosts, ranks_per_host=args.ranks_per_host, rate=rate) as lab:
                    # A first word that netlab knows nothing of; the rest as it came.
                    command = [sys.executable, str(script.resolve()), "--worker", "--rate", rate, *sys.argv[1:]]
                    code = lab.run([*command, "--out", str(part)])
            finally:  # what there is, if it was cut off
                if part.exists():
                    rows += json.loads(part.read_text())
                    part.unlink()
                    Path(args.out).write_text(json.dumps({"environment": found, "rows": rows}, indent=1) + "\n")
            if code:
                sys.exit(code)
