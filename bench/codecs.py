"""How fast the codecs are: GB/s read and written, as a share of the fastest plain copy in the same run.

    python bench/codecs.py --quick --out results.json     # the bars: 256 Mi and 16 Mi elements, under 100 s
    python bench/codecs.py --out results.json             # every family, format, block, dtype, 64 KiB .. 1 GiB
    python bench/codecs.py --device cpu --quick           # native and reference against torch.Tensor.copy_

Needs torch and this checkout; Triton, the native library and peers are measured where they are there. Prints one
table and, for the native library, whether it passes the bars. `--plot picture.png` draws the table (matplotlib).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from codec_calls import Work, chain, copies, one_way  # noqa: E402
from codec_peers import peers  # noqa: E402
from timing import Build, environment, host_cost, time_calls  # noqa: E402

MI, GI = 1 << 20, 1 << 30
BLOCKS = (32, 64, 128, 256, 2048)
USUAL = ("int8", "int4", "fp8_e4m3", "sign")


@dataclass(frozen=True)
class Row:
    """One measurement. Percentages are of the rate that Bench.copy_rate says."""

    implementation: str
    what: str
    family: str
    numel: int
    nbytes: int
    microseconds: float
    fastest: float
    slowest: float
    gb_per_s: float
    percent_of_copy: float
    bar: float | None = None
    """The percentage it must reach."""

    @property
    def verdict(self) -> str:
        return "" if self.bar is None else "PASS" if self.percent_of_copy >= self.bar else "FAIL"


class Bench:
    """Measures calls, and the copies that they are compared with."""

    def __init__(self, device: str):
        self.device = device
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self._copies: dict[int, float] = {}

    def copy_rate(self, nbytes: int) -> float:
        """Bytes read and written per second by the fastest copy of about `nbytes` (to within 1/16).

        From 128 MiB on a GPU, where size should not matter any more: by the fastest copy so far.
        """
        grain = 1 << max(nbytes.bit_length() - 5, 0)
        rounded = -(-nbytes // grain) * grain
        if rounded not in self._copies or self.device == "cpu":  # a CPU's rate changes with its neighbours
            timings = {
                what: time_calls(build, rounded, self.device, graph=graph)
                for what, (build, graph) in copies(rounded, self.device).items()
            }
            self._copies[rounded] = best = max(rounded / timing.median for timing in timings.values())
            for what, timing in timings.items():
                what = f"{what} of {rounded / MI:.1f} MiB read and written"
                self.rows.append(self._row("copy", what, "copy", 0, rounded, timing, best))
        if nbytes >= 128 * MI and self.device == "cuda":
            return max(self._copies.values())
        return self._copies[rounded]

    def measure(
        self, implementation: str, what: str, family: str, numel: int, nbytes: int, build: Build,
        *, bar: float | None = None, graph: bool = True,
    ) -> None:  # fmt: skip
        try:
            rate = self.copy_rate(nbytes)
            timing = time_calls(build, nbytes, self.device, graph=graph)
        except Exception as error:  # one row that fails must not lose the others
            reason = str(error).partition("\n")[0]  # compilers append what they compiled
            self.problems.append(f"{implementation} {what}, {numel} elements: {type(error).__name__}: {reason}")
            return
        row = self._row(implementation, what, family, numel, nbytes, timing, rate, bar)
        self.rows.append(row)
        print(line(row), flush=True)

    def measure_work(
        self, implementation: str, codec: Any, work: Work, *, bar: float | None = None, graph: bool = True
    ) -> None:
        build = partial(work.build, codec, self.device)
        self.measure(implementation, str(work), work.family, work.numel, work.nbytes, build, bar=bar, graph=graph)

    def _row(self, implementation, what, family, numel, nbytes, timing, rate, bar=None) -> Row:
        return Row(
            implementation,
            what,
            family,
            numel,
            nbytes,
            timing.median * 1e6,
            timing.fastest * 1e6,
            timing.slowest * 1e6,
            nbytes / timing.median / 1e9,
            100 * nbytes / timing.median / rate,
            bar,
        )


HEADER = f"{'implementation':14} {'what':58} {'Mi elem.':>9} {'us':>9} {'spread':>15} {'GB/s':>7} {'% copy':>7}  bar"


def line(row: Row) -> str:
    spread = f"{row.fastest:.1f}-{row.slowest:.1f}"
    bar = f"{row.bar:.0f} {row.verdict}" if row.bar is not None else ""
    return (
        f"{row.implementation:14} {row.what:58} {row.numel / MI:9.3g} {row.microseconds:9.1f} {spread:>15} "
        f"{row.gb_per_s:7.0f} {row.percent_of_copy:7.1f}  {bar}"
    )


def bars_of_the_gpu() -> Iterator[tuple[Work, float | None]]:
    """What must be reached on an H100, in percent of a device copy; None: for information."""
    n = 256 * MI
    for block in BLOCKS:
        for name in USUAL:
            yield Work(family="encode", format=name, block=block, numel=n), 92
    for name in ("mxfp4", "nvfp4"):
        yield Work(family="encode", format=name, numel=n), 70
    yield Work(family="encode", format="mxfp8", numel=n), None
    for name in ("int4", "int8"):
        yield Work(family="encode", format=name, block=128, numel=n, residual="bfloat16"), 88
        yield Work(family="encode", format=name, block=128, numel=n, residual="int8"), 80
        yield Work(family="encode", format=name, block=128, numel=n, residual="float32"), None
        yield Work(family="encode", format=name, block=128, numel=n, rotation=32), 85
        yield Work(family="encode", format=name, block=128, numel=n, rotation=32, residual="bfloat16"), None
        yield Work(family="encode", format=name, block=128, numel=n, stochastic=True), 80
    yield Work(family="decode_sum_encode", format="int4", block=128, numel=n), 75
    yield Work(family="decode_sum_encode", format="int8", block=128, numel=n), 85
    yield Work(family="decode_sum_encode", format="fp8_e4m3", block=128, numel=n), None
    for name in (*USUAL, "mxfp4", "nvfp4"):
        yield Work(family="decode", format=name, numel=n), 92
    n = 16 * MI
    for family in ("encode", "decode", "decode_sum_encode"):
        for name in USUAL:
            yield Work(family=family, format=name, block=128, numel=n), 75
    yield Work(family="encode", format="int4", block=128, numel=n, residual="bfloat16"), 75
    yield Work(family="decode_sum", format="int4", block=128, numel=n), 75


def bars_of_the_cpu() -> Iterator[tuple[Work, float | None]]:
    for name in ("int8", "int4"):
        for residual in ("float32", "bfloat16", "int8", ""):
            yield Work(family="encode", format=name, numel=32 * MI, dtype="float32", residual=residual), 50
        yield Work(family="decode", format=name, numel=32 * MI, dtype="float32"), 50
        yield Work(family="decode_sum_encode", format=name, numel=32 * MI), None


def everything(device: str) -> Iterator[tuple[Work, float | None]]:
    """Every family, format, block and dtype at one size, then sizes from 64 KiB to 1 GiB of bucket."""
    n = (64 if device == "cuda" else 4) * MI
    for family in ("encode", "decode", "decode_sum", "decode_sum_encode"):
        for name in ("int8", "int4", "int2", "sign", "fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4"):
            for block in (16, *BLOCKS, 4096):
                yield Work(family=family, format=name, block=block, numel=n), None
        yield Work(family=family, format="bf16", numel=n), None
    for dtype in ("float32", "float16"):
        for family in ("encode", "decode"):
            for name in (*USUAL, "nvfp4"):
                yield Work(family=family, format=name, numel=n, dtype=dtype), None
    for size in (16, 32, 64, 128, 256, 512, 1024):
        yield Work(family="encode", format="int4", numel=n, rotation=size), None
        yield Work(family="decode", format="int4", numel=n, rotation=size), None
    for shift in range(16, 31, 2 if device == "cuda" else 4):
        for family in ("encode", "decode", "decode_sum_encode"):
            yield Work(family=family, format="int4", numel=(1 << shift) // 2), None


def implementations(device: str) -> dict[str, ModuleType]:
    found = {"reference": importlib.import_module("commq.codecs.reference")}
    native = importlib.import_module("commq.codecs.native")
    if reason := native.missing(torch.device(device)):
        print(f"native: {reason}")
    else:
        found["native"] = native
    if device == "cuda":
        try:
            found["triton"] = importlib.import_module("commq.codecs.triton_kernels")
        except ImportError as error:
            print(f"triton: left out, {error}")
    return found


def small_calls(bench: Bench, codecs: dict[str, ModuleType]) -> dict[str, dict]:
    """The three-kernel chain on a 1 MiB bucket, and what a call costs the host, in microseconds."""
    results: dict[str, dict] = {}
    for name in ("native", "triton"):
        if name not in codecs:
            continue
        if bench.device == "cuda":
            timing = time_calls(chain(codecs[name], "cuda"), 2 << 20, "cuda")
            results[f"{name}: 3-kernel chain, 1 MiB bucket"] = {"us": timing.median * 1e6, "bar": 30.0}
        for family in ("encode", "decode", "decode_sum_encode"):
            call = Work(family=family, format="int4", numel=64 * 1024 // 2).build(codecs[name], bench.device)
            timing = host_cost(call, bench.device)
            results[f"{name}: host cost, {family}"] = {"us": timing.median * 1e6, "bar": 10.0}
    if bench.device == "cpu":
        return {}  # on a CPU the call is the work
    for what, result in results.items():
        verdict = "PASS" if result["us"] <= result["bar"] else "FAIL"
        result["verdict"] = verdict if what.startswith("native") else ""
        print(f"{what:73} {result['us']:9.1f} us, bar {result['bar']:.0f} us {result['verdict']}")
    return results


def run(bench: Bench, quick: bool, only: str) -> dict[str, dict]:
    codecs, device = implementations(bench.device), bench.device
    bars = list(bars_of_the_gpu() if device == "cuda" else bars_of_the_cpu())
    work = bars if quick else [*bars, *everything(device)]
    print(HEADER)
    bench.copy_rate(2 * GI if device == "cuda" else 256 * MI)
    for row in bench.rows:
        print(line(row))
    if device == "cuda":
        for what, (build, nbytes) in one_way(512 * MI, device).items():
            bench.measure("torch", f"{what}, 512 MiB", "copy", 0, nbytes, build)
    for w, bar in work:
        if "native" in codecs and only in str(w):
            bench.measure_work("native", codecs["native"], w, bar=bar)
    for w in others(device, quick):
        for name in ("triton", "reference"):
            if name not in codecs or only not in str(w) or (name == "reference" and w.numel > 16 * MI):
                continue
            bench.measure_work(name, codecs[name], w, graph=name == "triton")
    if device == "cuda":
        compiled = SimpleNamespace(encode_bucket=torch.compile(codecs["reference"].encode_bucket))
        bench.measure_work(
            "torch.compile", compiled, Work(family="encode", format="int4", block=128, numel=16 * MI), graph=False
        )
    if device == "cuda":
        for what, family, nbytes, build in peers(64 * MI):
            bench.measure(what.split()[0], what, family, 64 * MI, nbytes, build, graph=False)
    return small_calls(bench, codecs)


def others(device: str, quick: bool) -> Iterator[Work]:
    """What the implementations besides the native one are measured on."""
    n = 16 * MI if device == "cuda" else MI
    for numel in (n,) if quick or device == "cpu" else (n, 256 * MI):
        for family in ("encode", "decode", "decode_sum_encode"):
            for name in ("int4",) if quick else (*USUAL, "mxfp4", "nvfp4"):
                yield Work(family=family, format=name, numel=numel)
        yield Work(family="encode", format="int4", numel=numel, residual="bfloat16", rotation=32)
        yield Work(family="encode", format="int4", numel=numel, stochastic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the bars need")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write rows, bars and environment as JSON")
    parser.add_argument("--plot", type=Path, help="draw percent of copy by family (needs matplotlib)")
    parser.add_argument("--only", default="", help="only rows whose description contains this")
    args = parser.parse_args()

    bench = Bench(args.device)
    small = run(bench, args.quick, args.only)
    barred = [row for row in bench.rows if row.bar is not None]
    failed = [row for row in barred if row.verdict == "FAIL"]
    late = [what for what, result in small.items() if result["verdict"] == "FAIL"]
    for problem in bench.problems:
        print(f"not measured: {problem}")
    print(f"bars: {len(barred) - len(failed)} of {len(barred)} rates passed, {len(late)} latencies failed")
    for row in failed:
        print(f"FAIL {line(row)}")
    if args.out:
        rows = [{**asdict(row), "verdict": row.verdict} for row in bench.rows]
        result = {"environment": environment(args.device), "rows": rows, "calls": small, "problems": bench.problems}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    if args.plot:
        from plot import share_of_copy

        share_of_copy([asdict(row) for row in bench.rows], args.plot, title=str(environment(args.device)["device"]))


if __name__ == "__main__":
    main()
