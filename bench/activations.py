"""How fast the exchanges of tensor and sequence parallelism are between hosts on slow links, against bf16's.

    python bench/activations.py --hosts 2,4 --rates 10gbit --device cuda --out results.json
    python bench/activations.py --hosts 2 --rates 1gbit --shapes 2x256x512 --formats int8,spike5

Builds the lab of launch/netlab.py (needs root) for each number of hosts and runs this file in it, one rank a host.
Tensors are activations (batch, tokens, width) in bfloat16: normal numbers, and channels 100 times larger, the same on
every rank. Two exchanges of each: "all_reduce", as after a rowwise layer with a whole output (of two ranks by both
schedules; the styles of commq take one_shot there), and "reduce_scatter + all_gather" along the tokens, as with
sequence parallelism. "library" is torch.distributed's own in bf16 and in fp32, for the second without the copies that a
dimension other than the first needs; "no communication" is a copy of the tensor. Timed as in bench/collectives.py. A
row also has how many times faster than the library's bf16 it is, and the largest errors of the sum: of what is not an
outlier in units of its root mean square, and of the outliers relative to themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "launch")]

import commq.functional as F  # noqa: E402
from collectives import Worker  # noqa: E402
from lab import drive, write_rows  # noqa: E402
from model import all_reduce_bytes, milliseconds  # noqa: E402

OUTLIERS = 64
"""One channel in so many is an outlier: two in a block of 128."""
Call = Callable[[], torch.Tensor]


class Activations(Worker):
    """One rank's measurements at one rate."""

    def rows(self) -> Iterator[dict[str, Any]]:
        for shape in self.args.shapes.split(","):
            sizes = [int(size) for size in shape.split("x")]
            everyone = [self._activations(sizes, rank) for rank in range(self.world_size)]
            exact, x = sum(each.float() for each in everyone), everyone[self.rank]
            library: dict[str, float] = {}
            for exchange, format, call in self._exchanges(x):
                row = self._measure(call, runs=self.args.runs)
                kind = exchange.split()[0]
                if format == "library bf16":
                    library[kind] = row["median_ms"]
                name, moves = format.removeprefix("library "), format != "no communication"
                bound = all_reduce_bytes(x.numel(), name, world_size=self.world_size, dtype=x.dtype) if moves else 0
                yield {
                    "rate": self.args.rate,
                    "hosts": self.world_size,
                    "shape": shape,
                    "exchange": exchange,
                    "format": format,
                    **row,
                    "times_faster": library[kind] / row["median_ms"],
                    "bound_bytes": bound,
                    "bound_ms": milliseconds(bound, self.gbit) if self.gbit else None,
                    **(self._errors(call(), exact) if moves else {}),
                }

    def _activations(self, sizes: list[int], rank: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(rank)
        x = torch.randn(sizes, generator=generator, device=self.device)
        x[..., ::OUTLIERS] = 100.0 * (1.0 + x[..., ::OUTLIERS].abs())
        return x.to(torch.bfloat16)

    def _exchanges(self, x: torch.Tensor) -> Iterator[tuple[str, str, Call]]:
        """(exchange, format, call); a call returns the sum over ranks."""
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

        def library_sum(x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            dist.all_reduce(y)
            return y

        def library_parts(x: torch.Tensor) -> torch.Tensor:
            part, y = x.new_empty(x.numel() // self.world_size), torch.empty_like(x)
            scatter(part, x.view(-1))
            gather(y.view(-1), part)
            return y

        whole = x.float()
        yield "all_reduce", "library bf16", partial(library_sum, x)
        yield "all_reduce", "library fp32", partial(library_sum, whole)
        yield "all_reduce", "no communication", x.clone
        for schedule in ("one_shot", "two_shot") if self.world_size == 2 else ("two_shot",):
            for name in self.args.formats.split(","):
                call = partial(F.all_reduce, x, format=name, schedule=schedule)
                yield f"all_reduce {schedule}", name, call
        yield "reduce_scatter + all_gather", "library bf16", partial(library_parts, x)
        yield "reduce_scatter + all_gather", "library fp32", partial(library_parts, whole)
        for name in self.args.formats.split(","):
            yield (
                "reduce_scatter + all_gather",
                name,
                lambda name=name: F.all_gather(F.reduce_scatter(x, dim=1, format=name), dim=1, format=name),
            )

    def _errors(self, found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
        error, outlier = (found.float() - exact).abs(), torch.zeros(exact.shape[-1], dtype=torch.bool)
        outlier[::OUTLIERS] = True
        calm = exact[..., ~outlier].square().mean().sqrt()
        relative = error[..., outlier] / exact[..., outlier].abs()
        return {
            "calm_error": float(error[..., ~outlier].max() / calm),
            "outlier_error": float(relative.max()),
        }


def work(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rows = []
    for row in Activations(args).rows():
        rows.append(row)
        if dist.get_rank() == 0:
            write_rows(Path(args.out), rows)
            print(
                f"{row['rate']:>9} {row['hosts']} hosts {row['shape']:>12} {row['exchange']:>27} {row['format']:>16} "
                f"{row['median_ms']:>9.2f} ({row['fastest_ms']:.2f} .. {row['slowest_ms']:.2f}) ms "
                f"{row['times_faster']:>5.2f}x {row['link_bytes'] / 1e6:>8.2f} MB, "
                f"bound {row['bound_ms'] or 0.0:>8.2f} ms"
                + (f", errors {row['calm_error']:.4f} {row['outlier_error']:.5f}" if "calm_error" in row else ""),
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2,4", help="numbers of hosts, separated by commas")
    parser.add_argument("--rates", default="10gbit")
    parser.add_argument("--shapes", default="8x2048x2048", help="batch x tokens x width of the activations")
    parser.add_argument("--formats", default="bf16,int8,spike6,spike5,spike4,spike3,spike2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", default="out/activations.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rate", help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.dtype, args.ranks_per_host = "bfloat16", 1
    if args.worker:
        work(args)
    else:
        drive(Path(__file__), args)


if __name__ == "__main__":
    main()
