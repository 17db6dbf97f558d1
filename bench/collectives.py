"""How fast the collectives are between hosts on slow links, against the library's own.

    python bench/collectives.py --hosts 4 --rates 1gbit --sizes 64M --dtype float32 --out results.json
    python bench/collectives.py --hosts 4 --rates 1gbit,10gbit,25gbit,unshaped --device cuda --out results.json
    python bench/collectives.py --hosts 4 --ranks-per-host 2 --methods two_hop --rates 10gbit --device cuda
    torchrun --standalone --nproc-per-node 2 bench/collectives.py --worker --ranks-per-host 2 --device cuda --ratios
    python bench/plot_collectives.py results.json picture.png

Builds the lab of launch/netlab.py (needs root) for each number of hosts and runs this file in it, one process a rank.
Under torchrun, with --worker, it runs where it is: on the GPUs of one machine, with what joins them, or on a cluster.
Each call is timed alone, after a barrier, on the slowest rank. A row has the median, fastest and slowest of --runs
calls; the bytes that host 0's link really carried; the bound, which is the bytes it must send divided by its rate; and
what commq's own cost model expected. "no communication" is the codecs alone.

--ratios: only schedule auto against the library's all-reduce of the same tensor, in turn, as many calls between two
barriers as make BATCH seconds, each with its own synchronisation, so that what a call takes of the host counts and what
a barrier leaves behind does not. `ratio` is the median over pairs of auto / library.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "launch")]

import commq  # noqa: E402
from commq.codecs.reference import Coding  # noqa: E402
from commq.collectives import all_reduce as api  # noqa: E402
from commq.collectives.auto import find_costs  # noqa: E402
from commq.collectives.cost import predict  # noqa: E402
from commq.collectives.group import transport_of  # noqa: E402
from commq.collectives.message import Operand, make_messages  # noqa: E402
from commq.collectives.plan import Source, make_plans  # noqa: E402
from commq.collectives.rehearsal import Rehearsal  # noqa: E402
from commq.collectives.schedule import Exchange  # noqa: E402
from commq.collectives.two_shot import two_shot  # noqa: E402
from lab import drive, gbit, link_bytes, write_rows  # noqa: E402
from model import all_reduce_bytes, gather_bytes, milliseconds  # noqa: E402
from referee import Referee  # noqa: E402
from timing import environment  # noqa: E402

SUM = dist.ReduceOp.SUM
SCHEDULES = ("two_shot", "one_shot", "two_hop", "ring", "integer_sum", "one_bit")
Call = Callable[[], object]
BATCH = 0.01, 50
"""Seconds of calls between two barriers with --ratios, and the most calls."""
PAIRS = 15
SHORT = 4 << 20
"""Bytes up to which five times as many runs are made: they cost little and vary most."""


class Worker:
    """One rank's measurements at one rate."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(args.device)
        self.dtype = getattr(torch, args.dtype)
        self.gbit = gbit(args.rate)
        self.referee = Referee(self.device)

    def rows(self) -> Iterator[dict[str, Any]]:
        for nbytes in map(_bytes, self.args.sizes.split(",")):
            numel = nbytes // self.dtype.itemsize
            for method, format, bound, call in self._calls(numel):
                if self.args.methods and not any(method.startswith(m) for m in self.args.methods.split(",")):
                    continue
                row = self._measure(call, runs=self.args.runs * (5 if nbytes <= SHORT else 1))
                picked = self._picked(numel) if method == "auto" else ""
                expected = self._expected(numel, format, picked or method)
                yield {
                    **self._setting(nbytes),
                    "method": method,
                    "format": format,
                    "picked": picked,
                    **row,
                    "gb_per_s": nbytes / row["median_ms"] / 1e6,
                    "bound_bytes": bound,
                    "bound_ms": milliseconds(bound, self.gbit) if bound and self.gbit else None,
                    "expected_ms": expected,
                }

    def ratios(self) -> Iterator[dict[str, Any]]:
        """Rows of --ratios; they have the keys of others, with the library's time beside auto's."""
        for nbytes in map(_bytes, self.args.sizes.split(",")):
            numel = nbytes // self.dtype.itemsize
            x = torch.zeros(numel, dtype=self.dtype, device=self.device)
            for name in self.args.formats.split(","):
                calls = {
                    "library": lambda x=x: dist.all_reduce(x),
                    "auto": lambda x=x, name=name: commq.all_reduce(x, SUM, format=name),
                }
                for call in calls.values():
                    self._batch(call, 2)
                count = max(1, min(BATCH[1], int(BATCH[0] / self._batch(calls["library"], 3))))
                times: dict[str, list[float]] = {which: [] for which in calls}
                for pair in range(PAIRS):
                    for which in sorted(calls, reverse=pair % 2 == 0):
                        times[which].append(self._batch(calls[which], count) * 1e3)
                yield {
                    **self._setting(nbytes),
                    "method": "auto beside library",
                    "format": name,
                    "picked": self._picked(numel),
                    "calls": count,
                    "median_ms": statistics.median(times["auto"]),
                    "library_ms": statistics.median(times["library"]),
                    "fastest_ms": min(times["auto"]),
                    "slowest_ms": max(times["auto"]),
                    "ratio": statistics.median(a / b for a, b in zip(times["auto"], times["library"], strict=True)),
                }

    def _setting(self, nbytes: int) -> dict[str, Any]:
        """What a row has of where and of what it was measured."""
        return {
            "rate": self.args.rate,
            "hosts": self.world_size // self.args.ranks_per_host,
            "ranks_per_host": self.args.ranks_per_host,
            "dtype": self.args.dtype,
            "numel": nbytes // self.dtype.itemsize,
            "nbytes": nbytes,
        }

    def _batch(self, call: Call, count: int) -> float:
        """Seconds of a call, on the slowest rank."""
        self.referee.start()
        return self.referee.largest(sum(self.referee.seconds(call) for _ in range(count)) / count)

    def _calls(self, numel: int) -> Iterator[tuple[str, str, int, Call]]:
        """(method, format, bytes that a host must send, call); tensors are made when a method's turn comes."""
        world_size, ranks_per_host = self.world_size, self.args.ranks_per_host
        generator = torch.Generator(self.device).manual_seed(self.rank)
        x = torch.randn(numel, generator=generator, device=self.device).to(self.dtype)
        sizes = {"world_size": world_size, "dtype": self.dtype}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            y = x.to(dtype)
            yield "library", name, all_reduce_bytes(numel, name, **sizes), lambda y=y: dist.all_reduce(y)
        for name in self.args.formats.split(","):
            yield "no communication", name, 0, lambda name=name: self._rehearse(x, name)
            bound = all_reduce_bytes(numel, name, ranks_per_host=ranks_per_host, **sizes)
            for schedule in ("auto", *SCHEDULES):
                if schedule != "auto" and schedule not in api.SCHEDULES:
                    continue
                if (schedule == "one_bit") != (name == "sign") and schedule not in ("auto", "two_shot", "one_shot"):
                    continue
                if schedule == "two_hop" and ranks_per_host == 1:
                    continue
                yield (
                    schedule,
                    name,
                    bound if schedule == "two_shot" else 0,
                    lambda schedule=schedule, name=name: commq.all_reduce(x, SUM, format=name, schedule=schedule),
                )
        chunk = numel // world_size
        parts, own = x[: chunk * world_size], torch.empty(chunk, dtype=self.dtype, device=self.device)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        raw = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        bound = gather_bytes(numel, raw, **sizes)
        yield "library reduce_scatter", raw, bound, lambda: scatter(own, parts)
        yield "library all_gather", raw, bound, lambda: gather(parts, own)
        for name in self.args.formats.split(","):
            bound = gather_bytes(numel, name, **sizes)
            yield "reduce_scatter", name, bound, lambda name=name: commq.reduce_scatter(own, parts, format=name)
            yield "all_gather", name, bound, lambda name=name: commq.all_gather(parts, own, format=name)

    def _measure(self, call: Call, runs: int) -> dict[str, Any]:
        call()
        times, sent = [], []
        for _ in range(runs):
            self.referee.start()
            before = link_bytes()
            seconds = self.referee.seconds(call)
            sent.append(link_bytes() - before)
            times.append(self.referee.largest(seconds) * 1e3)
        return {
            "median_ms": statistics.median(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
            "link_bytes": int(statistics.median(sent)),
        }

    def _plans(self, numel: int, name: str) -> Any:
        fmt = commq.get_format(name)
        source = Source(numel, self.dtype, fmt, fmt)
        piece_bytes = api.PIECE_BYTES[self.device.type]
        return source, make_plans((source,), world_size=self.world_size, piece_bytes=piece_bytes)

    def _rehearse(self, x: torch.Tensor, name: str) -> None:
        """Everything but the moves."""
        _, plans = self._plans(x.numel(), name)
        operand = Operand(x, torch.empty_like(x), Coding())
        messages = make_messages(plans, [operand], Rehearsal(transport_of(None)), average=True)
        Exchange(map(two_shot, messages)).finish()

    def _expected(self, numel: int, name: str, schedule: str) -> float | None:
        if schedule not in ("one_shot", "two_shot", "plain"):
            return None
        source, plans = self._plans(numel, name)
        costs = find_costs(
            {key: api.SCHEDULES[key] for key in ("one_shot", "two_shot")},
            source,
            Coding(),
            transport_of(None),
            device=self.device,
            backend="auto",
        )
        return predict(schedule, plans, costs) / 1e6

    def _picked(self, numel: int) -> str:
        """The schedule of the last message of this length that schedule auto chose for."""
        notes = reversed(transport_of(None).memory.notes.items())
        return next(v.name for k, v in notes if k[:2] == ("all_reduce", "auto") and k[-1][0][0] == numel)


def _bytes(size: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(float(size[:-1]) * unit[size[-1]]) if size[-1] in unit else int(size)


def work(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rows = []
    worker = Worker(args)
    surroundings = environment(args.device) if dist.get_rank() == 0 else {}
    for row in worker.ratios() if args.ratios else worker.rows():
        rows.append(row)
        if dist.get_rank() == 0:
            found = rows if "NETLAB" in os.environ else {"environment": surroundings, "rows": rows}
            write_rows(Path(args.out), found)
        if args.ratios and dist.get_rank() == 0:
            print(
                f"{row['rate']:>9} {row['nbytes']:>10} {row['format']:>5} {row['picked']:>8} "
                f"auto {row['median_ms']:9.4f} library {row['library_ms']:9.4f} ms, auto / library {row['ratio']:.3f}",
                flush=True,
            )
            continue
        if dist.get_rank() == 0:
            bound = f"{100 * row['bound_ms'] / row['median_ms']:5.1f} %" if row["bound_ms"] else ""
            expected = f"{row['expected_ms']:9.2f}" if row["expected_ms"] else ""
            print(
                f"{row['rate']:>9} {row['nbytes']:>10} {row['method']:>22} {row['format']:>5} {row['picked']:>8} "
                f"{row['median_ms']:>9.2f} ({row['fastest_ms']:.2f} .. {row['slowest_ms']:.2f}) ms "
                f"{row['gb_per_s']:>7.2f} GB/s {row['link_bytes'] / 1e6:>9.2f} MB {bound:>8} {expected:>9}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="4", help="numbers of hosts, separated by commas")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rates", default="1gbit,10gbit,25gbit,unshaped")
    parser.add_argument("--sizes", default="4K,16K,64K,256K,1M,4M,16M,64M,256M", help="bytes of the tensor")
    parser.add_argument("--formats", default="int8,int4,sign")
    parser.add_argument("--methods", default="", help="only those that begin with one of these")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ratios", action="store_true", help="only auto against the library, call for call")
    parser.add_argument("--out", default="out/collectives.json")
    parser.add_argument("--worker", action="store_true", help="be a rank of what is there, without a lab")
    parser.add_argument("--rate", default="unshaped", help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.worker:
        work(args)
    else:
        drive(Path(__file__), args)


if __name__ == "__main__":
    main()
