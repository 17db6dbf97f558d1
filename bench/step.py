"""How long a training step takes between hosts on slow links, whatever the gradients travel by.

    python bench/step.py --device cuda --rates unshaped,10gbit,1gbit --out out/step.jsonl        # the table
    python bench/step.py --device cuda --methods "commq int4" --recipes "int4 int4:schedule=auto" --profile
    python bench/step.py --device cpu --model tiny --rates unshaped,100mbit                      # to try it out
    torchrun --standalone --nproc-per-node 2 bench/step.py --worker --ranks-per-host 2 --rates unshaped   # NVLink
    torchrun --nnodes 4 ... bench/step.py --worker --rates unshaped                              # on a real cluster
    python bench/plot_step.py out/step.jsonl picture.png

GPT-2 with random tokens: forward, backward and fused AdamW, bf16 autocast (CUDA) with float32 gradients; DDP with
buckets of 25 MB and gradients that are views of them, for all methods. Builds the lab of launch/netlab.py (needs root
and pyroute2) once and runs this file in it, one process a rank; the rate of the links is changed while it runs. Each
row is a new model, and is written to --out as soon as it is known; rows that are there already are not repeated, so
the same command goes on where it was cut off.

A step is timed from its start to the device's last kernel, on the slowest rank; a row has median, fastest, slowest
and mean. The mean is what counts where steps differ (ZeroOneAdam's ranks meet in every fifth).
"beyond" is the median without that of "no communication"; "host us" is what a hook takes of the host for a bucket.
"expected" is a model, no measurement: all buckets but the last travel beside the computation, the last one, which has
the embedding, after it: max(compute, (bytes - last) / rate) + last / rate, with "no communication" as compute.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "launch")]

from commq.collectives.group import transport_of  # noqa: E402
from gpt2 import MODELS  # noqa: E402
from host_parts import host_parts  # noqa: E402
from lab import gbit, link_bytes  # noqa: E402
from model import milliseconds  # noqa: E402
from recipe_text import read_recipe, split_recipes  # noqa: E402
from referee import Referee  # noqa: E402
from step_fsdp import fsdp_methods  # noqa: E402
from step_methods import DDP_OPTIONS, Method, ddp_methods  # noqa: E402
from step_rows import BASELINE, HEAD, Row, line, read_rows  # noqa: E402
from step_training import Training  # noqa: E402
from timing import environment  # noqa: E402

RECIPES = "int8 int4 onebit fp8"
METHODS: dict[str, Callable[[list[str], int], Iterable[Method]]] = {
    "ddp": ddp_methods,
    "fsdp": partial(fsdp_methods, False),
    "zero2": partial(fsdp_methods, True),
}
"""By --parallel: DDP, FSDP2 with full sharding, FSDP2 with parameters kept after the forward pass."""
STEPS = 2, 24
"""Timed steps: as many as fit in SECONDS, but no fewer and no more than these."""
SECONDS = 4.0


class Worker:
    """One rank."""

    def __init__(self, args: argparse.Namespace, rows: list[Row]) -> None:
        self.args, self.rows = args, rows
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(args.device)
        self.referee = Referee(self.device)
        self.config = MODELS[args.model]
        self.start = time.monotonic()
        self.setting = {
            "parallel": args.parallel,
            "model": args.model,
            "rows": args.rows,
            "hosts": self.world_size // args.ranks_per_host,
            "ranks_per_host": args.ranks_per_host,
            "bucket_cap_mb": args.bucket_cap_mb,
        }
        self.environment = environment(args.device) if self.rank == 0 else {}

    def execute(self) -> Iterator[Row]:
        methods = list(METHODS[self.args.parallel](split_recipes(self.args.recipes), self.world_size))
        if self.args.methods:
            wanted = tuple(self.args.methods.split(","))
            methods = [method for method in methods if method.name == BASELINE or method.name.startswith(wanted)]
        for rate in self.args.rates.split(","):
            for method in methods:
                name = {**self.setting, "rate": rate, "method": method.name}
                if any(name.items() <= row.items() and "median_ms" in row for row in self.rows):
                    continue
                if self.referee.largest(time.monotonic() - self.start) > self.args.budget:
                    return
                row = {**name, "detail": method.detail, **self._measure(method, rate)}
                if "median_ms" in row:
                    row |= self._compare(row)
                self.rows.append(row)
                yield {**row, "environment": self.environment}

    def _measure(self, method: Method, rate: str) -> Row:
        """The row, or why there is none."""
        found: Row = {}
        error = None
        try:
            found = self._time(method, rate)
        except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        errors = self.referee.share(error)
        if self.device.type == "cuda":
            collect()
            torch.cuda.empty_cache()
        failed = [text for text in errors if text is not None]
        return {"error": failed[0][:500]} if failed else found

    def _time(self, method: Method, rate: str) -> Row:
        self.referee.set_rate(rate if method.measures_link else "unshaped")
        memory = transport_of(None).memory  # what was measured at another rate
        memory.facts.clear()
        memory.notes.clear()
        training = Training(method, self.config, self.args.rows, self.device)
        for _ in range(method.warm_up):
            training.step()
        self.referee.set_rate(rate)
        first = self.referee.largest(self.referee.seconds(training.step))
        count = method.steps or min(max(int(SECONDS / first), STEPS[0]), STEPS[1])
        attached = training.attached
        attached.host_seconds.clear()
        link, sent = link_bytes(), attached.sent_bytes(training.steps)
        times = [self.referee.seconds(training.step) for _ in range(count)]
        link, after = link_bytes() - link, attached.sent_bytes(training.steps)
        host = [seconds * 1e6 for seconds in attached.host_seconds]
        times = [self.referee.largest(seconds) * 1e3 for seconds in times]
        row = {
            "median_ms": statistics.median(times),
            "mean_ms": statistics.fmean(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
            "steps": count,
            "link_bytes": int(self.referee.largest(link / count)),
            "sent_bytes": None if sent is None or after is None else (after - sent) // count,
            "buckets": [numel for _, numel in sorted(attached.buckets.items())],
            "host_us_per_bucket": statistics.median(host) if host else None,
            "host_us_slowest": max(host) if host else None,
        }
        if self.args.profile:
            row["host_parts"] = host_parts(training.step)
            if self.device.type == "cuda":
                row["profile"] = training.profile()
        return row

    def _compare(self, row: Row) -> Row:
        """What the row means beside "no communication", which is measured first."""
        same = [r for r in self.rows if self.setting.items() <= r.items() and "median_ms" in r]
        base = next((r for r in same if r["method"] == BASELINE and r["rate"] == row["rate"]), row)
        if "profile" in row and "profile" in base:
            counts = row["profile"]
            counts["allocations_beyond"] = counts["allocations"] - base["profile"]["allocations"]
        beyond, rate = row["median_ms"] - base["median_ms"], gbit(row["rate"])
        nbytes = row["sent_bytes"] if row["sent_bytes"] is not None else row["link_bytes"]
        if not rate or not base["buckets"]:
            return {"beyond_ms": beyond, "expected_ms": base["median_ms"] if not nbytes else None, "link_ms": None}
        link = milliseconds(nbytes, rate)
        last = link * base["buckets"][-1] / sum(base["buckets"])
        return {
            "beyond_ms": beyond,
            "link_ms": link,
            "hidden": 1 - beyond / link if link and row is not base else None,
            "expected_ms": max(base["median_ms"], link - last) + last,
        }


def collect() -> None:
    """Free the memory of a model: DDP and its reducer hold each other, and when they go, a hook and its optimizer."""
    gc.collect()
    gc.collect()


def work(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.set_num_threads(1)
    DDP_OPTIONS["bucket_cap_mb"] = args.bucket_cap_mb
    rows = read_rows(Path(args.out))
    # A rank that failed alone leaves the others waiting: not for long.
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(seconds=120))
    if dist.get_rank() == 0:
        print(HEAD, flush=True)
    for row in Worker(args, rows).execute():
        if dist.get_rank() == 0:
            print(line(row), flush=True)
            with Path(args.out).open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def drive(args: argparse.Namespace) -> int:
    from netlab import Lab

    with Lab(hosts=args.hosts, ranks_per_host=args.ranks_per_host) as lab:
        # A first word that netlab knows nothing of; the rest as it came.
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *sys.argv[1:]]
        code = lab.run(command, quiet_others=True)
    print(HEAD)
    for row in read_rows(Path(args.out)):
        print(line(row))
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hosts", type=int, default=4)
    add("--ranks-per-host", type=int, default=1)
    add("--rates", default="unshaped,10gbit,1gbit", help="of the links, separated by commas")
    add("--model", default="gpt2", choices=tuple(MODELS))
    add("--rows", type=int, default=8, help="sequences of a rank and step")
    add("--parallel", default="ddp", choices=tuple(METHODS))
    add("--recipes", default=RECIPES, help=f"of commq, separated by blanks, as bench/recipe_text.py says ({RECIPES})")
    add("--methods", default="", help="only those that begin with one of these, separated by commas")
    add("--bucket-cap-mb", type=int, default=DDP_OPTIONS["bucket_cap_mb"], help="of DDP, for all rows")
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--profile", action="store_true", help="parts of the hook's host time; CUDA: count allocations, too")
    add("--budget", type=float, default=float("inf"), help="seconds after which no new row starts")
    add("--out", default="out/step.jsonl")
    add("--worker", action="store_true", help="be a rank of what is there, without a lab")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.worker:
        work(args)
        return
    for text in split_recipes(args.recipes):
        try:
            read_recipe(text)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the lab, too
    sys.exit(drive(args))


if __name__ == "__main__":
    main()
