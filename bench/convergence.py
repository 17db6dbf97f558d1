"""What a recipe costs in loss: runs of several seeds, each paired with the uncompressed run of the same seed.

    python bench/convergence.py --recipes "int8 int4 int2 onebit" --seeds 0,1,2 --jobs 12 --out out/convergence.jsonl
    python bench/convergence.py --recipes "" --lowp "fp8 int8 -+adamw8bit fp8+adamw8bit+int4" --out out/lowp.jsonl
    python bench/convergence.py --parallel fsdp --seeds 0,1,2 --jobs 12 --out out/sharded.jsonl
    python bench/convergence.py --report out/convergence.jsonl                # the table again, and the gates
    python bench/plot_convergence.py out/convergence.jsonl picture.png
    python bench/convergence.py --device cpu --steps 20 --rows 1 --layers 1 --dim 64 --heads 2 --val-bytes 4096

A byte GPT of 10.8 M parameters on the source of Python's standard library, 4 ranks, 2000 steps of AdamW. The ranks of
a run live in one process (bench/replicas.py), and --jobs runs share a GPU under NVIDIA MPS. A recipe is a name or a
file and what it replaces: int4:rotation=32,feedback=none (bench/recipe_text.py). Each run that has ended is one line
of --out; a run that is there already is not repeated, so the same command goes on where it was cut off. After
--budget seconds, less what a run takes, no new one starts.

Gates, of the mean paired gap in validation loss: gap <= max(bound, 2 standard errors). A gate that nothing fails proves
nothing: int2, rounded to -1, 0, 1 without feedback, must fail that of 2 bits. --lowp has low-precision GEMMs and
moments, bounds and controls of their own (bench/convergence_lowp.py); they are compared with AdamW in bfloat16.

--parallel fsdp trains as commq.fully_shard does (bench/sharded_replicas.py): float32 masters, weights gathered and
computed in bfloat16 (CPU: float32), gradients reduced in float32. What is uncompressed is the baseline. A recipe that
sends differences keeps parameters after the forward pass (ZeRO-2), others gather them twice (ZeRO-3): the same bits.
hsdp shares them out inside a host. --hosts: how many the ranks pretend to be on, for recipes that travel in two hops.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "launch")]

from commq.attach.fsdp import check_recipe  # noqa: E402
from commq.train.config import ModelConfig, OptimizerConfig  # noqa: E402
from convergence_lowp import BASE_UPDATE, Choice, emulation_work, label_of, read_choice  # noqa: E402
from convergence_report import BASELINE, COARSE, DIRECT, ROUGH, key_of, read_rows, report  # noqa: E402
from convergence_run import UPDATES, Run, Setting  # noqa: E402
from netlab_mps import Mps, gpus, mps_program  # noqa: E402
from recipe_text import read_recipe, split_recipes  # noqa: E402
from sharded_replicas import check_hosts  # noqa: E402
from timing import environment  # noqa: E402

RECIPES = {
    "ddp": "int8 int4 int2 onebit",
    "fsdp": f"full-shard sdp4bit zero++ qsdp loco-two-hop {DIRECT} {COARSE}",
    "hsdp": f"hybrid-shard {ROUGH}",
}
"""By --parallel: those that have gates, and controls."""


def wanted(args: argparse.Namespace) -> list[Setting]:
    """All runs: the uncompressed ones, which all others need, and then those that take longest."""
    model = ModelConfig(layers=args.layers, dim=args.dim, heads=args.heads, context=args.context)
    optimizer = OptimizerConfig(lr=args.lr, warmup=args.warmup)
    choices = [Choice(recipe=text, update=args.update) for text in (BASELINE, *split_recipes(args.recipes))]
    lowp = [read_choice(text) for text in args.lowp.split()]
    choices += [Choice(recipe=BASELINE, outlier=choice.outlier) for choice in lowp] + lowp
    settings = [
        Setting(
            **asdict(choice),
            seed=seed,
            parallel=args.parallel,
            hosts=args.hosts,
            steps=args.steps,
            world_size=args.world_size,
            rows=args.rows,
            val_bytes=args.val_bytes,
            model=model,
            optimizer=optimizer,
            device=args.device,
        )
        for seed in map(int, args.seeds.split(","))
        for choice in dict.fromkeys(choices)
    ]
    return sorted(settings, key=lambda setting: -_weight(setting))


def _weight(setting: Setting) -> int:
    """Runs with more start earlier: how much work they are, roughly, after what everything is compared with."""
    if setting.precision != "none":
        return emulation_work(setting.precision)
    if setting.recipe == BASELINE and setting.update not in BASE_UPDATE:
        return 5
    recipe = read_recipe(setting.recipe)
    if recipe.schedule not in ("two_shot", "one_shot", "auto"):
        return 4
    return (recipe.rotation is not None) + (recipe.rounding == "stochastic") + (recipe.feedback.rule != "none")


class Driver:
    """Starts runs as processes, at most `--jobs` on each device, and writes down what they found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.start = time.monotonic()
        self.longest = 0.0
        self.failed = 0

    def execute(self) -> None:
        done = [key_of(row) for row in read_rows(self.out)]
        waiting = [setting for setting in wanted(self.args) if key_of(asdict(setting)) not in done]
        print(f"{len(done)} runs are there, {len(waiting)} to do", flush=True)
        places = (gpus() if self.args.device == "cuda" else []) or [""]
        free = places * self.args.jobs
        running: list[_Process] = []
        with shared_gpu(self.args.device), tempfile.TemporaryDirectory() as folder:
            try:
                while running or (waiting and not self._late()):
                    while free and waiting and not self._late():
                        running.append(_Process(waiting.pop(0), free.pop(0), Path(folder), len(waiting)))
                    for process in [process for process in running if process.code is not None]:
                        running.remove(process)
                        free.append(process.device)
                        self._take(process)
                    time.sleep(0.1)
            finally:
                for process in running:
                    process.stop()
        if waiting:
            print(f"out of time: {len(waiting)} runs are left; give the same command again", flush=True)

    def _late(self) -> bool:
        return time.monotonic() - self.start + self.longest > self.args.budget

    def _take(self, process: _Process) -> None:
        took = process.seconds
        setting = process.setting
        if process.code:
            self.failed += 1
            print(f"FAILED {label_of(asdict(setting))} seed {setting.seed}:\n{process.log()}", flush=True)
            return
        self.longest = max(self.longest, took)
        row = json.loads(process.result.read_text())
        with self.out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        elapsed = time.monotonic() - self.start
        print(
            f"{elapsed:6.0f} s  {label_of(row):<40} seed {setting.seed}  val {_show(row['val_loss'])}  "
            f"{row['seconds'] / row['steps_made'] * 1e3:6.1f} ms a step, {took:.0f} s",
            flush=True,
        )


class _Process:
    """A run under way."""

    def __init__(self, setting: Setting, device: str, folder: Path, number: int) -> None:
        self.setting, self.device = setting, device
        self.result, self._log = folder / f"{number}.json", folder / f"{number}.log"
        self._begun = time.monotonic()
        environ = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
        if device:
            environ["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, str(Path(__file__).resolve()), "--run", json.dumps(asdict(setting))]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--out", str(self.result)], env=environ, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def code(self) -> int | None:
        return self._process.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def log(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-15:])

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def shared_gpu(device: str) -> Iterator[None]:
    """NVIDIA MPS for the runs, if there is a GPU: without it their kernels take turns."""
    program = mps_program() if device == "cuda" else None
    if program is None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        mps = Mps(program, Path(folder))
        before = dict(os.environ)
        if mps.start():
            os.environ.update(mps.environment)
        else:
            print("NVIDIA MPS does not start; runs that share a GPU take turns", flush=True)
        try:
            yield
        finally:
            mps.quit()
            os.environ.clear()
            os.environ.update(before)


def _show(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def run_one(text: str, out: Path) -> None:
    """In a process of its own."""
    sys.setswitchinterval(1e-5)  # ranks are threads that hand over to each other some hundred times a step
    fields = json.loads(text)
    fields["model"], fields["optimizer"] = ModelConfig(**fields["model"]), OptimizerConfig(**fields["optimizer"])
    setting = Setting(**fields)
    row = Run(setting).execute()
    row["environment"] = environment(setting.device)
    out.write_text(json.dumps(row))


def _lowp_recipes(texts: str, parser: argparse.ArgumentParser) -> list[str]:
    """What travels in the runs with low precision."""
    try:
        return [read_choice(text).recipe for text in texts.split()]
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipes", help=f"separated by blanks; {BASELINE} is always there; by default those that have gates")
    add("--parallel", default="ddp", choices=tuple(RECIPES))
    add("--hosts", type=int, help="that the ranks of fsdp and hsdp pretend to be on (1; hsdp 2)")
    add("--seeds", default="0,1,2")
    add("--lowp", default="", help="precision+update+recipe, separated by blanks (bench/convergence_lowp.py)")
    add("--update", default="adamw", choices=tuple(UPDATES))
    add("--steps", type=int, default=2000)
    add("--world-size", type=int, default=4)
    add("--rows", type=int, default=8, help="sequences of a rank and step")
    add("--layers", type=int, default=6)
    add("--dim", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--context", type=int, default=256)
    add("--lr", type=float, default=1.5e-3)
    add("--warmup", type=int, default=100)
    add("--val-bytes", type=int, default=1 << 19)
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--jobs", type=int, default=1, help="runs at once on each device")
    add("--budget", type=float, default=float("inf"), help="seconds")
    add("--out", default="out/convergence.jsonl")
    add("--report", metavar="FILE", help="print the table of a file, and run nothing")
    add("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args.run, Path(args.out))
        return
    if args.report:
        print(report(read_rows(Path(args.report))))
        return
    sharded = args.parallel != "ddp"
    args.recipes = RECIPES[args.parallel] if args.recipes is None else args.recipes
    args.hosts = args.hosts or (2 if args.parallel == "hsdp" else 1)
    if sharded and (args.lowp or args.update != "adamw"):
        parser.error(f"--parallel {args.parallel} with --lowp or --update: expected AdamW on plain layers")
    if not sharded and args.hosts != 1:
        parser.error("--hosts with --parallel ddp: expected fsdp or hsdp")
    try:
        check_hosts(args.world_size, args.hosts, hybrid=args.parallel == "hsdp")
    except ValueError as error:
        parser.error(str(error))
    for text in (*split_recipes(args.recipes), *_lowp_recipes(args.lowp, parser)):
        try:
            recipe = read_recipe(text)
            if sharded:
                check_recipe(recipe, None, hybrid=args.parallel == "hsdp")
        except (OSError, ValueError) as error:
            parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends runs and MPS, too
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    driver = Driver(args)
    driver.execute()
    print(report(read_rows(Path(args.out))))
    sys.exit(driver.failed > 0)


if __name__ == "__main__":
    main()
