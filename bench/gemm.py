"""How fast low-precision linear layers are, quantization included: a whole step of a GPT block, and single GEMMs.

    python bench/gemm.py --out gemm.jsonl                        # the bars: a block of dim 4096 at 16k tokens; 90 s
    python bench/gemm.py --rows fp8,int8 --parts step --profile  # where the time goes
    python bench/gemm.py --parts filter                          # from which width on a layer gains
    python bench/gemm.py --device cpu --dim 128 --heads 2 --tokens 256 --parts step   # to try it out

The step is forward, backward and fused AdamW of one block of commq.train's GPT (attention, GELU MLP) in bf16 with bf16
gradients, under torch.compile(fullgraph=True); rows are compared within one run only. Each row is written as soon as it
is known. Single GEMMs and encodings are timed from CUDA graphs over buffers that no cache holds (timing.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import commq.lowp as lowp  # noqa: E402
from commq.lowp import real  # noqa: E402
from commq.lowp.codes import Codes  # noqa: E402
from commq.lowp.gemm import Gemm  # noqa: E402
from commq.lowp.quantize import Counter  # noqa: E402
from commq.lowp.recipes import PRECISIONS  # noqa: E402
from commq.train.config import ModelConfig  # noqa: E402
from commq.train.model import Block, rotation_table  # noqa: E402
from timing import Build, Call, Timing, environment, time_calls  # noqa: E402

BARS = {"fp8": 1.25, "fp8-block": 1.1, "int8": 1.1}
"""Times as fast as bf16 that a step must be."""
ROWS = ("bf16", "fp8", "fp8-rowwise", "fp8-block", "int8", "torchao tensorwise", "torchao rowwise")
WIDTHS = (512, 1024, 2048, 4096, 8192)
Row = dict[str, Any]


def converted(block: nn.Module, name: str) -> nn.Module:
    if name.startswith("torchao"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        return convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name(name.split()[1]))
    conversion = lowp.convert(block, {"default": name, "keep": [], "min_features": 0})
    conversion.step(0)
    return block


class Step:
    """Forward, backward and optimizer of one block."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = ModelConfig(layers=1, dim=args.dim, heads=args.heads, context=args.sequence)
        with torch.device(args.device):
            self.block = Block(config).to(torch.bfloat16)
            shape = args.tokens // args.sequence, args.sequence, args.dim
            self.x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
            self.dy = torch.randn(shape, dtype=torch.bfloat16)
        self.rotation = rotation_table(args.sequence, args.dim // args.heads, torch.device(args.device))
        self.block = converted(self.block, name)
        self.run = torch.compile(self.block, fullgraph=True, backend=args.backend)
        self.optimizer = torch.optim.AdamW(self.block.parameters(), lr=1e-6, fused=True)

    def __call__(self) -> None:
        self.x.grad = None
        self.run(self.x, self.rotation).backward(self.dy)
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(args: argparse.Namespace) -> Iterator[Row]:
    bf16: tuple[float, Tensor] | None = None
    for name in args.rows:
        start = time.perf_counter()
        try:
            step = Step(args, name)
            step()
        except Exception as error:  # whatever a compiler raises: the other rows go on
            yield {"part": "step", "row": name, "error": f"{type(error).__name__}: {error}"[:800]}
            continue
        compiled = time.perf_counter() - start
        assert step.x.grad is not None
        dx = step.x.grad.float().flatten()
        timing = clocked(step, args)
        row: Row = {"part": "step", "row": name, "ms": timing.median * 1e3, "fastest_ms": timing.fastest * 1e3,
                    "slowest_ms": timing.slowest * 1e3, "compile_s": compiled}  # fmt: skip
        if name == "bf16":
            bf16 = timing.median, dx
        if bf16 is not None:
            row["times_bf16"] = bf16[0] / timing.median
            row["cosine_dx"] = float(torch.nn.functional.cosine_similarity(dx, bf16[1], dim=0))
        if args.device == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        if args.profile:
            row["kernels"] = profile(step, args)
        yield row
        del step


def clocked(step: Call, args: argparse.Namespace) -> Timing:
    """Seconds of a step: several runs of a few steps in a row, so that starting them does not count."""
    for _ in range(2):
        step()
    seconds = []
    for _ in range(args.runs):
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / args.steps)
    return Timing.of(seconds)


def profile(step: Call, args: argparse.Namespace) -> list[tuple[str, float]]:
    """The kernels of a step that take longest: name and milliseconds."""
    with torch.profiler.profile() as found:
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(event.key[:90], event.self_device_time_total / 1e3) for event in events[:16]]


def coded(x: Tensor, gemm: Gemm, first: bool) -> Codes:
    counter = Counter(0, 0, torch.zeros((), dtype=torch.int64, device=x.device))
    found, _ = real.encode(x, gemm.first if first else gemm.second, None, (counter, counter))
    assert found is not None
    return found


def gemms(args: argparse.Namespace) -> Iterator[Row]:
    """Each GEMM of a layer dim -> 4 dim by itself, and what encodes its operands."""
    tokens, inputs, outputs = args.tokens, args.dim, 4 * args.dim
    sizes = {"forward": (tokens, outputs, inputs), "input_gradient": (tokens, inputs, outputs),
             "weight_gradient": (outputs, inputs, tokens)}  # fmt: skip

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=args.device, dtype=torch.bfloat16)

    for which, (R, S, C) in sizes.items():

        def plain(R: int = R, S: int = S, C: int = C) -> Call:
            a, b = matrix(R, C), matrix(S, C)
            return lambda: a @ b.T

        base = time_calls(plain, 2 * (R * C + S * C + R * S), args.device, runs=5)
        yield {
            "part": "gemm",
            "row": "bf16",
            "gemm": which,
            "us": base.median * 1e6,
            "tflops": 2e-12 * R * S * C / base.median,
        }
        for name in args.rows:
            how = None if name.startswith("torchao") else getattr(PRECISIONS[name], which)
            if how is None:
                continue

            def product(R: int = R, S: int = S, C: int = C, how: Gemm = how) -> Call:
                a, b = coded(matrix(R, C), how, True), coded(matrix(S, C), how, False)
                return lambda: real.multiply(a, b, how, torch.bfloat16)

            nbytes = R * C + S * C + 2 * R * S
            yield timed_gemm(args, product, nbytes, {"row": name, "gemm": which}, 2e-12 * R * S * C, base.median)
            if which == "forward" and how.first.format.name == "int8":

                def library(R: int = R, S: int = S, C: int = C, how: Gemm = how) -> Call:
                    a, b = coded(matrix(R, C), how, True), coded(matrix(S, C), how, False)
                    return lambda: torch._int_mm(a.codes, b.codes.T)

                label = {"row": "torch._int_mm, int32 out", "gemm": which}
                yield timed_gemm(args, library, nbytes + 2 * R * S, label, 2e-12 * R * S * C, base.median)
    for name in args.rows:
        if name.startswith("torchao") or name == "bf16":
            continue
        how = PRECISIONS[name]

        def both(how: Any = how) -> Call:
            x = matrix(tokens, inputs)
            counter = Counter(0, 0, torch.zeros((), dtype=torch.int64, device=x.device))
            return lambda: real.encode(x, how.forward.first, how.weight_gradient.second, (counter, counter))

        took = time_calls(both, 4 * tokens * inputs, args.device, runs=5)
        rate = 4 * tokens * inputs / took.median / 1e9
        yield {"part": "encode", "row": name, "what": "x both ways", "us": took.median * 1e6, "gb_per_s": rate}


def timed_gemm(
    args: argparse.Namespace,
    build: Build,
    nbytes: int,
    label: Row,
    work: float,
    base: float,
) -> Row:
    try:
        took = time_calls(build, nbytes, args.device, runs=5).median
    except Exception as error:
        return {"part": "gemm", **label, "error": str(error)[:500]}
    return {"part": "gemm", **label, "us": took * 1e6, "tflops": work / took, "times_bf16": base / took}


def widths(args: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward of one layer, width x width, not compiled, without the host's time."""
    for width in WIDTHS:
        times = {}
        for name in ("bf16", *(row for row in args.rows if row != "bf16" and not row.startswith("torchao"))):

            def layer(name: str = name, width: int = width) -> Call:
                made = nn.Linear(width, width, bias=False, device=args.device, dtype=torch.bfloat16)
                lowp.convert(made, {"default": name, "keep": [], "min_features": 0}).step(0)
                x = torch.randn(args.tokens, width, device=args.device, dtype=torch.bfloat16).requires_grad_()
                dy = torch.randn_like(x)
                return lambda: torch.autograd.grad(made(x), (x, made.weight), dy)

            times[name] = time_calls(layer, 12 * args.tokens * width, args.device, runs=5).median
            gain = times["bf16"] / times[name]
            yield {"part": "filter", "row": name, "width": width, "us": times[name] * 1e6, "times_bf16": gain}


def tune(args: argparse.Namespace) -> Iterator[Row]:
    """The configurations of the INT8 kernel, on the GEMMs of a layer dim -> 4 dim."""
    from commq.lowp import triton_int8

    how = PRECISIONS["int8"].forward
    assert how is not None
    for R, S, C in ((args.tokens, 4 * args.dim, args.dim), (args.tokens, args.dim, 4 * args.dim),
                    (4 * args.dim, args.dim, args.tokens), (args.tokens, args.dim, args.dim)):  # fmt: skip
        a, b = (torch.randn(rows, C, device=args.device, dtype=torch.bfloat16) for rows in (R, S))
        first, second = coded(a, how, True), coded(b, how, False)
        out = torch.empty(R, S, device=args.device, dtype=torch.bfloat16)
        for config in triton_int8.CONFIGS:
            call = partial(triton_int8.multiply_rows, first.codes, second.codes, first.steps, second.steps, out, config)
            took = time_calls(partial(partial, call), R * C + S * C + 2 * R * S, args.device, runs=3).median
            label = {"part": "tune", "row": f"{R}x{S}x{C}", "what": str(config)}
            yield {**label, "us": took * 1e6, "tflops": 2e-12 * R * S * C / took}


PARTS = {"step": steps, "gemm": gemms, "filter": widths, "tune": tune}


def line(row: Row) -> str:
    label = " ".join(str(row[key]) for key in ("row", "gemm", "what", "width") if key in row)
    if "error" in row:
        return f"{row['part']:7} {label:38} {row['error'][:150]}"
    numbers = [f"{row['ms']:9.3f} ms" if "ms" in row else f"{row['us']:9.1f} us"]
    numbers += [
        f"{row[key]:8.3f} {key}" for key in ("times_bf16", "tflops", "gb_per_s", "cosine_dx", "peak_gb") if key in row
    ]
    bar = BARS.get(row["row"]) if row["part"] == "step" and "times_bf16" in row else None
    verdict = "" if bar is None else f"  bar {bar}: {'PASS' if row['times_bf16'] >= bar else 'FAIL'}"
    kernels = "".join(f"\n{took:20.3f} ms  {name}" for name, took in row.get("kernels", ()))
    return f"{row['part']:7} {label:38} {' '.join(numbers)}{verdict}{kernels}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas")
    parser.add_argument("--parts", default="step,gemm", help="step, gemm, filter, tune")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--profile", action="store_true", help="the longest kernels of each step")
    parser.add_argument("--out", type=Path, help="append rows to this file, as JSON lines")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    args.sequence = min(args.sequence, args.tokens)
    setting = {"environment": environment(args.device), "dim": args.dim, "tokens": args.tokens}
    for part in args.parts.split(","):
        for row in PARTS[part](args):
            print(line(row), flush=True)
            if args.out is not None:
                with args.out.open("a") as out:
                    out.write(json.dumps({**row, **setting}) + "\n")


if __name__ == "__main__":
    main()
