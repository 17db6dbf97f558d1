"""Train one small GPT with each recipe, same seed and data, and compare loss and bytes sent.

    bash launch/quickstart.sh --help

Writes OUT/quickstart.png, OUT/quickstart.json and, for each recipe, a folder OUT/quickstart/RECIPE that
`python -m commq.train` made. With Ctrl-C the processes save and end; --keep continues from there.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import commq
from commq.train.metrics import Row, read_rows
from quickstart_figure import draw

LINK_GBITS = (1, 10, 25)  # 10**9 bits a second


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train one small GPT with each recipe, same seed and data, and compare loss and bytes sent."""

    recipes: tuple[str, ...] = ("fp32", "bf16", "int8", "int4", "onebit")
    """What to compare; gaps are to fp32."""
    steps: int = 400
    """Optimizer steps of each run; about 0.12 s each on two CPU cores."""
    processes: int = 2
    """Processes of each run."""
    seed: int = 0
    """Seed of all runs."""
    data: Path | None = None
    """File or folder to train on; by default the source code of Python's standard library."""
    out: Path = Path("out")
    """Folder for the results."""
    keep: bool = False
    """Keep finished runs with the same options and continue interrupted ones, instead of starting afresh."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.recipes) - set(commq.recipes()))
        if unknown or not self.recipes:
            raise ValueError(f"recipes={self.recipes}: expected some of {', '.join(commq.recipes())}")
        if self.processes < 2 or self.steps < 1:
            raise ValueError(f"processes={self.processes}, steps={self.steps}: expected 2 processes and a step or more")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run showed; bytes are those of rank 0."""

    recipe: str
    val_loss: float
    """Nats per byte on held-out text."""
    gap_percent: float | None
    """100 * (val_loss / val_loss of fp32 - 1); None without an fp32 run."""
    sent_bytes_per_step: float
    ratio: float
    """Bytes sent / bytes of fp32 gradients."""
    seconds: float
    """Training and validation, without start-up."""
    computed_communication_ms: dict[str, float]
    """Bytes sent per step / rate, by link in Gbit/s: computed, not measured."""


def main() -> int:
    options = tyro.cli(Options)
    console = Console()
    console.print(
        f"{len(options.recipes)} runs of {options.steps} steps with {options.processes} processes each: "
        f"{', '.join(options.recipes)}.\nAbout {len(options.recipes) * (8 + 0.12 * options.steps) / 60:.0f} minutes "
        f"on two CPU cores; Ctrl-C saves and stops. Results go to {options.out}/quickstart.*"
    )
    folder = options.out / "quickstart"
    try:
        for recipe in options.recipes:
            console.rule(recipe)
            train(recipe, options, folder / recipe)
    except SignalException:
        console.print("interrupted; --keep continues from here")
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        console.print(f"rank {rank} of the last run failed with exit code {failure.exitcode}; see its message above")
        return 1

    runs = {recipe: read_rows(folder / recipe) for recipe in options.recipes}
    results = [summarize(recipe, rows, runs.get("fp32")) for recipe, rows in runs.items()]
    draw(runs, options.out / "quickstart.png")
    write_json(options, results, folder)
    console.print(tabulate(results, options))
    console.print(f"{options.out}/quickstart.png shows the curves, {options.out}/quickstart.json has the numbers.")
    return 0


def train(recipe: str, options: Options, out: Path) -> None:
    """One run in processes of its own, as torchrun would start it. They end when this process does."""
    if not options.keep:
        shutil.rmtree(out, ignore_errors=True)
    arguments = ["-m", "commq.train", "--recipe", recipe, "--out", out, "--steps", options.steps]
    arguments += ["--seed", options.seed, "--log-every", "1", "--no-tensorboard", "--resume"]
    arguments += ["--data", options.data] if options.data else []
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid4().hex,
        max_restarts=0,
    )
    elastic_launch(config, sys.executable)(*arguments)


def summarize(recipe: str, rows: list[Row], baseline: list[Row] | None) -> Result:
    last = rows[-1]
    assert last.val_loss is not None, "the last step of a run is always validated"
    gap = None
    if baseline is not None and baseline[-1].val_loss is not None:
        gap = 100 * (last.val_loss / baseline[-1].val_loss - 1)
    sent = last.sent_bytes / last.step
    return Result(
        recipe=recipe,
        val_loss=last.val_loss,
        gap_percent=gap,
        sent_bytes_per_step=sent,
        ratio=last.sent_bytes / last.raw_bytes if last.raw_bytes else 1.0,
        seconds=last.seconds,
        computed_communication_ms={str(rate): sent * 8 / (rate * 1e9) * 1e3 for rate in LINK_GBITS},
    )


def tabulate(results: list[Result], options: Options) -> Table:
    table = Table(
        title=f"{options.steps} steps, {options.processes} processes, seed {options.seed}",
        caption="loss: nats per byte on held-out text. gap: to fp32; below about 0.5 % it is noise at this length. "
        "MB: sent by one rank. computed: milliseconds that they take at the given Gbit/s, without latency and overlap.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
    )
    table.add_column("recipe")
    for name in ("loss", "gap, %", "MB per\nstep", "of fp32", "run, s"):
        table.add_column(name, justify="right")
    for rate in LINK_GBITS:
        table.add_column(f"computed\nms at {rate}", justify="right", style="dim")
    for result in results:
        table.add_row(
            result.recipe,
            f"{result.val_loss:.4f}",
            "" if result.gap_percent is None else f"{result.gap_percent:+.2f}",
            f"{result.sent_bytes_per_step / 1e6:.3f}",
            f"{result.ratio:.3f}",
            f"{result.seconds:.0f}",
            *(f"{milliseconds:.2f}" for milliseconds in result.computed_communication_ms.values()),
        )
    return table


def write_json(options: Options, results: list[Result], folder: Path) -> None:
    """The table with all digits, and what it was made with; the rows of each step stay in metrics.jsonl."""
    first = json.loads((folder / options.recipes[0] / "config.json").read_text())
    content = {
        "options": asdict(options),
        "machine": {name: first[name] for name in ("ranks", "torch")} | {"cores": os.cpu_count()},
        "rows": {recipe: str(folder / recipe / "metrics.jsonl") for recipe in options.recipes},
        "results": [asdict(result) for result in results],
    }
    (options.out / "quickstart.json").write_text(json.dumps(content, indent=2, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
