"""How many tokens a pipeline trains on in a second when its stages are hosts on slow links.

    python bench/pipeline.py --device cuda --rates 1gbit --out out/pipeline.jsonl       # the table: under two minutes
    python bench/pipeline.py --device cpu --model tiny --rates 20mbit --rows 8 --micro-batches 4   # to try it

GPT-2 of 124 M parameters in 4 stages, random tokens, bf16 autocast (CUDA), fused AdamW, torch's ScheduleGPipe or
Schedule1F1B; one process a stage in the lab of launch/netlab.py (needs root and pyroute2), on one GPU under NVIDIA MPS
if there is no more. A step is timed from its start to the device's last kernel, on the slowest rank.

"bound" is the time that the bytes need which the busiest host sends, or receives, on its link: a stage in the middle
sends activations one way and gradients the other. No schedule that sends these bytes can be faster. Bytes are counted
by the stages; "link" is what the busiest host's link has carried, headers included.
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
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "launch")]

from commq.attach.pipeline import PipelineStage  # noqa: E402
from gpt2 import random_tokens  # noqa: E402
from lab import gbit, link_bytes  # noqa: E402
from model import milliseconds  # noqa: E402
from pipeline_stage import BASELINE, MODELS, PLAIN, Method, Stage, methods, next_token_loss  # noqa: E402
from referee import Referee  # noqa: E402
from timing import environment  # noqa: E402

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
BATCHES = 2
"""Different ones, in turn: each sample's differences are those of a later epoch when steps are timed."""
WARM_UP = 3
STEPS = 2, 8
"""Timed steps: as many as fit in SECONDS, but no fewer and no more than these."""
SECONDS = 3.0
Row = dict[str, Any]


class Training:
    """One rank's stage, its optimizer and its batches."""

    def __init__(self, method: Method, args: argparse.Namespace, device: torch.device) -> None:
        self.method, self.device = method, device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        config = MODELS[args.model]
        torch.manual_seed(self.rank)
        with device:
            module = Stage(config, self.rank, self.count)
        self.stage = method.make(module, self.rank, self.count, device)
        self.schedule = SCHEDULES[args.schedule](self.stage, args.micro_batches, loss_fn=next_token_loss)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        self.tokens = [random_tokens(config, args.rows, seed=i, device=device) for i in range(BATCHES)]
        self.steps = 0

    def step(self) -> None:
        tokens_BT, number = self.tokens[self.steps % BATCHES], self.steps % BATCHES
        if self.method.names_samples:
            rows = len(tokens_BT)
            self.stage.set_samples(torch.arange(number * rows, (number + 1) * rows))
        inputs = [tokens_BT[:, :-1].contiguous()] if self.rank == 0 else []
        targets = {"target": tokens_BT[:, 1:].contiguous()} if self.rank == self.count - 1 else {}
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            self.schedule.step(*inputs, **targets)
        self.optimizer.step()
        self.steps += 1

    def bytes(self) -> tuple[int, int]:
        """Sent and received so far; torch's own stage does not count."""
        if isinstance(self.stage, PipelineStage):
            return self.stage.sent_bytes, self.stage.received_bytes
        return 0, 0


class Worker:
    """One rank."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.referee = Referee(self.device)
        self.start = time.monotonic()

    def execute(self) -> Iterator[Row]:
        for rate in self.args.rates.split(","):
            for method in methods(BATCHES * self.args.rows):
                if self.args.methods and not method.name.startswith(tuple(self.args.methods.split(","))):
                    continue
                if self.referee.largest(time.monotonic() - self.start) > self.args.budget:
                    return
                yield {"rate": rate, "method": method.name, "detail": method.detail, **self._measure(method, rate)}

    def _measure(self, method: Method, rate: str) -> Row:
        self.referee.set_rate("unshaped")
        training = Training(method, self.args, self.device)
        for _ in range(WARM_UP):
            training.step()
        self.referee.set_rate(rate)
        count = min(max(int(SECONDS / self._timed(training)), STEPS[0]), STEPS[1])
        link, (sent, received) = link_bytes(), training.bytes()
        times = [self._timed(training) for _ in range(count)]
        after_sent, after_received = training.bytes()
        busiest = int(self.referee.largest(max(after_sent - sent, after_received - received) / count))
        carried = int(self.referee.largest((link_bytes() - link) / count))
        median = statistics.median(times)
        del training
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {
            "median_ms": median * 1e3,
            "fastest_ms": min(times) * 1e3,
            "slowest_ms": max(times) * 1e3,
            "steps": count,
            "tokens_per_second": self.args.rows * MODELS[self.args.model].context / median,
            "busiest_bytes": busiest,
            "link_bytes": carried,
            "bound_ms": milliseconds(busiest, gbit(rate)) if gbit(rate) else None,
        }

    def _timed(self, training: Training) -> float:
        self.referee.start()
        return self.referee.largest(self.referee.seconds(training.step))


HEAD = (
    f"{'rate':>9} {'method':<24} {'median':>8} {'fastest':>8} {'slowest':>8} {'bound':>8} ms "
    f"{'of bound':>8} {'tokens/s':>9} {'of bf16':>7} {'MB':>7} {'link MB':>8}"
)


def line(row: Row, rows: list[Row]) -> str:
    """A row of the table; "of bf16" is how many times as fast as that row."""
    plain = next((r for r in rows if (r["rate"], r["method"]) == (row["rate"], PLAIN)), None)
    times = " ".join(f"{row[name]:8.1f}" for name in ("median_ms", "fastest_ms", "slowest_ms"))
    bound = f"{row['bound_ms']:8.1f}" if row["bound_ms"] else f"{'-':>8}"
    of_bound = f"{row['median_ms'] / row['bound_ms']:8.2f}" if row["bound_ms"] else f"{'-':>8}"
    factor = f"{row['tokens_per_second'] / plain['tokens_per_second']:7.2f}" if plain else f"{'-':>7}"
    sizes = f"{row['busiest_bytes'] / 1e6:7.2f} {row['link_bytes'] / 1e6:8.2f}"
    text = f"{row['rate']:>9} {row['method']:<24} {times} {bound}    {of_bound}"
    return f"{text} {row['tokens_per_second']:9.0f} {factor} {sizes}"


def work(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    found = environment(args.device) if dist.get_rank() == 0 else {}
    setting = {name: getattr(args, name) for name in ("model", "rows", "micro_batches", "schedule")}
    if dist.get_rank() == 0:
        print(HEAD, flush=True)
    rows: list[Row] = []
    for row in Worker(args).execute():
        rows.append(row)
        if dist.get_rank() == 0:
            print(line(row, rows), flush=True)
            with Path(args.out).open("a") as stream:
                stream.write(
                    json.dumps({**setting, "stages": dist.get_world_size(), **row, "environment": found}) + "\n"
                )
    dist.barrier()
    dist.destroy_process_group()


def drive(args: argparse.Namespace) -> int:
    from netlab import Lab

    with Lab(hosts=args.stages) as lab:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *sys.argv[1:]]
        return lab.run(command, quiet_others=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", type=int, default=4)
    add("--rates", default="1gbit", help="of the links, separated by commas")
    add("--model", default="gpt2", choices=tuple(MODELS))
    add("--rows", type=int, default=32, help="sequences of a step")
    add("--micro-batches", type=int, default=16)
    add("--schedule", default="gpipe", choices=tuple(SCHEDULES))
    add("--methods", default="", help=f"only those that begin with one of these, separated by commas; {BASELINE} first")
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--budget", type=float, default=float("inf"), help="seconds after which no new row starts")
    add("--out", default="out/pipeline.jsonl")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.micro_batches <= args.rows:
        parser.error(f"--micro-batches {args.micro_batches} with --rows {args.rows}: expected 1 to {args.rows}")
    if args.worker:
        work(args)
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the lab, too
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    sys.exit(drive(args))


if __name__ == "__main__":
    main()
