"""What encoded boundaries of a pipeline cost in loss: each run is paired with the uncompressed run of the same seed.

    python bench/pipeline_loss.py --task finetune --seeds 0,1,2 --jobs 9 --out out/pipeline_loss.jsonl
    python bench/pipeline_loss.py --task pretrain --seeds 0,1,2 --jobs 9 --out out/pipeline_loss.jsonl
    python bench/pipeline_loss.py --report out/pipeline_loss.jsonl
    python bench/pipeline_loss.py --task finetune --device cpu --layers 4 --dim 64 --heads 2 --context 64 --steps 50
        --samples 256 --rows 16 --epochs 3 --val-bytes 8192                                       # to try it out

A byte GPT of 10.8 M parameters in 4 stages, which live in one process (bench/pipeline_chain.py). pretrain: one pass, no
sequence twice. finetune: an uncompressed run of `--steps` on the first half of the text, the same for all methods of a
seed, then several epochs over `--samples` sequences of the second half. Losses are those of the whole model on held-out
text. Gradients cross in int8 throughout. Runs that are in --out are not repeated; --jobs of them share a GPU, under
NVIDIA MPS if it is there.

"tiles 0" has 4 bits throughout. Gates: gap <= max(0.5 %, 2 standard errors) of the best differences of 2 to 3 bits
(finetune) and of the best tiles (pretrain). The controls, 2 bits direct, must fail them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "launch")]

import commq  # noqa: E402
from commq.attach.crossing import Way, way_of  # noqa: E402
from commq.codecs.formats import get_format  # noqa: E402
from commq.train.config import ModelConfig, OptimizerConfig  # noqa: E402
from commq.train.data import load_corpus, train_batch, val_batches  # noqa: E402
from commq.train.model import GPT, next_byte_loss  # noqa: E402
from commq.train.optimizer import learning_rate, make_optimizer  # noqa: E402
from convergence import shared_gpu  # noqa: E402
from pipeline_chain import Chain  # noqa: E402
from timing import environment  # noqa: E402

STAGES = 4
BASELINE, CONTROL = "fp32", "direct int2"
BOUND = 0.5
METHODS = {
    "finetune": (BASELINE, "differences lloyd2", "differences int2", "differences alq3", "differences int4", CONTROL),
    "pretrain": (BASELINE, "tiles", "tiles 0", "direct int4", "direct lloyd4", CONTROL),
}
JUDGED = {
    "finetune": ("differences lloyd2", "differences int2", "differences alq3"),
    "pretrain": ("tiles", "tiles 0"),
}
FINETUNE = OptimizerConfig(lr=3e-4, warmup=20)
PRETRAIN = OptimizerConfig(lr=1.5e-3, warmup=100)
Row = dict[str, Any]


def ways_of(method: str, samples: int, width: int) -> tuple[Way, Way]:
    """Forward and backward. width: of a token; no block spans two."""
    if method == BASELINE:
        return way_of("fp32"), way_of("fp32")
    kind, _, name = method.partition(" ")
    if kind == "tiles":
        return commq.Tiles(narrow_share=float(name or 0.2)), way_of("int8")
    block = min(width & -width, 128)
    fmt = get_format(name, block=block)
    rotation = commq.Rotation(size=block) if fmt.fit != "largest" else None
    if kind == "direct":
        return commq.Direct(fmt, rotation=rotation), way_of("int8")
    return commq.Differences(samples=samples, format=fmt, rotation=rotation, cache="device"), way_of("int8")


class Run:
    """One method with one seed."""

    def __init__(self, args: argparse.Namespace, method: str, seed: int) -> None:
        self.args, self.method, self.seed = args, method, seed
        self.device = torch.device(args.device)
        self.model = ModelConfig(layers=args.layers, dim=args.dim, heads=args.heads, context=args.context)
        self.corpus = load_corpus(None, max_mb=32.0, context=args.context)
        torch.manual_seed(seed)
        self.gpt = GPT(self.model).to(self.device)

    def execute(self) -> Row:
        start = time.perf_counter()
        sent = self._finetune() if self.args.task == "finetune" else self._pretrain(self.method, self.corpus.train)
        return {"val_loss": self._validate(), "sent_bytes": sent, "seconds": time.perf_counter() - start}

    def _pretrain(self, method: str, text: Tensor) -> int:
        """Bytes that all boundaries carried."""
        chain = Chain(self.gpt, STAGES, ways_of(method, 1, self.model.dim), seed=self.seed)
        optimizer, steps = make_optimizer(self.gpt, PRETRAIN), self.args.steps
        for step in range(1, steps + 1):
            tokens = train_batch(
                text, seed=self.seed, step=step, micro=0, rank=0, rows=self.args.rows, context=self.args.context
            )
            self._step(chain, optimizer, tokens, None, learning_rate(step, steps, PRETRAIN))
        return chain.sent_bytes

    def _finetune(self) -> int:
        text, args = self.corpus.train, self.args
        half = len(text) // 2
        self._load_or_pretrain(text[:half])
        all_tokens = train_batch(
            text[half:], seed=self.seed, step=0, micro=0, rank=0, rows=args.samples, context=args.context
        )
        chain = Chain(self.gpt, STAGES, ways_of(self.method, args.samples, args.dim), seed=self.seed)
        optimizer, step = make_optimizer(self.gpt, FINETUNE), 0
        steps = args.epochs * (args.samples // args.rows)
        for epoch in range(args.epochs):
            order = torch.randperm(args.samples, generator=torch.Generator().manual_seed(self.seed << 8 | epoch))
            for ids in order.split(args.rows)[: args.samples // args.rows]:
                step += 1
                self._step(chain, optimizer, all_tokens[ids], ids, learning_rate(step, steps, FINETUNE))
        return chain.sent_bytes

    def _load_or_pretrain(self, text: Tensor) -> None:
        """Uncompressed, once for each seed."""
        args = self.args
        shape = f"{args.layers}x{args.dim}x{args.context}-{args.steps}x{args.rows}-{args.device}-{self.seed}"
        path = Path(args.out).parent / f"pretrained-{shape}.pt"
        if not path.exists():
            self._pretrain(BASELINE, text)
            partial = path.with_suffix(".partial")
            torch.save(self.gpt.state_dict(), partial)
            partial.rename(path)
        self.gpt.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))

    def _step(self, chain: Chain, optimizer: Any, tokens: Tensor, ids: Tensor | None, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        tokens = tokens.to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            chain.backward(tokens, self.args.micro_batches, ids)
        clip_grad_norm_(self.gpt.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Of the whole model, nats per byte; None if it diverged."""
        context = self.model.context
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for sequences in val_batches(
            self.corpus.val, count=-(-self.args.val_bytes // context), rank=0, world_size=1, rows=64, context=context
        ):
            tokens = sequences.to(self.device)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = self.gpt(tokens[:, :-1])
            total += next_byte_loss(logits, tokens[:, 1:]).double() * len(tokens)
            count += len(tokens)
        loss = float(total) / count
        return loss if math.isfinite(loss) else None


def read_rows(path: Path) -> list[Row]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[Row]) -> str:
    """A table and gates for each task."""
    parts = []
    for task in METHODS:
        mine = [row for row in rows if row["task"] == task]
        base = {row["seed"]: row for row in mine if row["method"] == BASELINE}
        gaps: dict[str, list[float]] = {}
        lines = [f"{task}: {'method':<22} {'bytes':>6} {'val loss':>9} {'gap %':>8} {'std error':>9} {'seeds':>5}"]
        for method in dict.fromkeys(row["method"] for row in mine):
            pairs = [(row, base[row["seed"]]) for row in mine if row["method"] == method and row["seed"] in base]
            if not pairs:
                continue
            losses = [math.inf if row["val_loss"] is None else row["val_loss"] for row, _ in pairs]
            gaps[method] = [
                100 * (loss / other["val_loss"] - 1) for loss, (_, other) in zip(losses, pairs, strict=True)
            ]
            ratio = pairs[0][0]["sent_bytes"] / pairs[0][1]["sent_bytes"]
            lines.append(
                f"{'':<{len(task) + 2}}{method:<22} {ratio:6.3f} {statistics.fmean(losses):9.4f} "
                f"{statistics.fmean(gaps[method]):+8.3f} {_error(gaps[method]):9.3f} {len(losses):>5}"
            )
        if mine:
            parts.append("\n".join([*lines, *_gates(task, gaps)]))
    return "\n\n".join(parts)


def _gates(task: str, gaps: dict[str, list[float]]) -> list[str]:
    found = []
    judged = {name: gaps[name] for name in JUDGED[task] if name in gaps}
    if judged:
        best = min(judged, key=lambda name: statistics.fmean(judged[name]))
        found.append(_gate(best, judged[best], must_fail=False))
    if CONTROL in gaps:
        found.append(_gate(CONTROL, gaps[CONTROL], must_fail=True))
    return found


def _gate(name: str, gaps: list[float], *, must_fail: bool) -> str:
    if len(gaps) < 2:
        return f"----  {name}: one seed says nothing about its error"
    limit, mean = max(BOUND, 2 * _error(gaps)), statistics.fmean(gaps)
    word = "PASS" if (mean <= limit) != must_fail else "FAIL"
    return f"{word}  {name} {mean:+.3f} %, {'must exceed' if must_fail else 'at most'} {limit:.3f} %"


def _error(gaps: list[float]) -> float:
    """Standard error of the mean; NaN if it is not known."""
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return math.nan
    return statistics.stdev(gaps) / len(gaps) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="finetune", choices=tuple(METHODS))
    add("--methods", default="", help="separated by commas; all of the task")
    add("--seeds", default="0,1,2")
    add("--steps", type=int, default=1000, help="of pretraining")
    add("--rows", type=int, default=32, help="sequences of a step")
    add("--micro-batches", type=int, default=2)
    add("--samples", type=int, default=4096, help="sequences of an epoch of fine-tuning")
    add("--epochs", type=int, default=6)
    add("--layers", type=int, default=6)
    add("--dim", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--context", type=int, default=256)
    add("--val-bytes", type=int, default=1 << 19)
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--jobs", type=int, default=1, help="runs at once")
    add("--out", default="out/pipeline_loss.jsonl")
    add("--report", metavar="FILE", help="print the tables of a file, and run nothing")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.report:
        print(report(read_rows(Path(args.report))))
        return
    torch.set_num_threads(1)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1 and not args.alone:
        failed = run_at_once(args)
        print(report(read_rows(out)))
        sys.exit(failed > 0)
    run(args)
    if args.alone:
        return
    print(report(read_rows(out)))


def run_at_once(args: argparse.Namespace) -> int:
    """A process for each run, uncompressed ones first: they leave what fine-tuning starts from. Runs that failed."""
    methods = args.methods.split(",") if args.methods else [*METHODS[args.task]]
    seeds = args.seeds.split(",")
    begun = [(seed, BASELINE) for seed in seeds]
    others = [(seed, method) for method in methods if method != BASELINE for seed in seeds]
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--alone"]

    def start(one: tuple[str, str]) -> int:
        return subprocess.run([*command, "--seeds", one[0], "--methods", one[1]]).returncode

    with shared_gpu(args.device), ThreadPoolExecutor(args.jobs) as pool:
        return sum(code != 0 for some in (begun, others) for code in pool.map(start, some))


def run(args: argparse.Namespace) -> None:
    """One method after the other, seed by seed."""
    out = Path(args.out)
    names = ("task", "steps", "rows", "micro_batches", "samples", "epochs", "layers", "dim", "heads", "context")
    setting = {name: getattr(args, name) for name in (*names, "val_bytes", "device")}
    for seed in map(int, args.seeds.split(",")):
        for method in args.methods.split(",") if args.methods else METHODS[args.task]:
            key = {**setting, "method": method, "seed": seed}
            if any(key.items() <= row.items() for row in read_rows(out)):
                continue
            row = {**key, **Run(args, method, seed).execute()}
            with out.open("a") as stream:
                stream.write(json.dumps({**row, "environment": environment(args.device)}) + "\n")
            print(f"seed {seed}  {method:<22} val {row['val_loss']}  {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
