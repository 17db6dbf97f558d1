"""The report of a complete run: report.md and report.png in the out folder."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from commq.lowp.statistics import Statistic
from commq.train.display import format_bytes
from commq.train.metrics import Row, read_events, read_rows, read_statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from commq.train.run import Run

DRAWN = (("forward", "input"), ("forward", "weight"), ("input_gradient", "gradient"))
"""GEMM and operand of what is shown; the other GEMMs have the same operands, perhaps in other formats."""


def check_matplotlib() -> None:
    """ValueError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed; pip install matplotlib, or pass --no-report")


def write_report(run: Run) -> Path:
    """Write both files from what the run has logged; returns the path of the text. On rank 0."""
    out = run.config.output.out
    rows, statistics = read_rows(out), read_statistics(out)
    _draw(rows, statistics, run.trainer.tokens_per_step, out / "report.png")
    path = out / "report.md"
    path.write_text(report_text(run, rows, statistics))
    return path


def report_text(run: Run, rows: Sequence[Row], statistics: Sequence[tuple[int, list[Statistic]]]) -> str:
    """Markdown: configuration, loss, speed, memory, bytes, precision of each layer, and what the guard did."""
    config, trainer, last = run.config, run.trainer, rows[-1]
    sent, plain = last.sent_bytes / last.step, last.raw_bytes / last.step
    share = f"{sent / plain:.3f} of fp32" if plain else "nothing to send"
    facts = [
        ("ranks", str(run.ranks)),
        ("parameters", f"{sum(p.numel() for p in trainer.ddp.parameters()) / 1e6:.2f} M"),
        ("parallel, recipe", f"{config.parallel}, {trainer.recipe.name}"),
        ("precision", "none" if trainer.control is None else str(trainer.control.schedule)),
        ("optimizer", config.optimizer.optimizer),
        ("validation loss", f"{last.val_loss:.4f} nats per byte" if last.val_loss is not None else "-"),
        ("training loss", f"{last.train_loss:.4f} in step {last.step}"),
        ("speed", f"{_speed(rows, trainer.tokens_per_step):,.0f} tokens/s over all ranks, median"),
        ("sent by rank 0", f"{format_bytes(sent)} a step, {share}"),
        ("optimizer state of rank 0", format_bytes(state_bytes(trainer.optimizer))),
        ("largest memory of rank 0", format_bytes(peak_bytes(run.ranks.device))),
    ]
    lines = ["# Training run", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)]
    lines += ["", "![loss, speed, bytes and SQNR](report.png)", ""]
    if statistics:
        lines += _layers(*statistics[-1])
    if events := read_events(config.output.out):
        lines += ["## What the guard did", "", *(f"- {event}" for event in events), ""]
    lines += ["## Configuration", "", "```toml", (config.output.out / "config.toml").read_text().rstrip(), "```", ""]
    return "\n".join(lines)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, of this rank."""
    tensors = [_local(t) for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(device: torch.device) -> int:
    """Largest memory of the device's allocator; of the process, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _speeds(rows: Sequence[Row], tokens_per_step: int) -> list[tuple[int, float]]:
    """(step, tokens a second since the row before); rows with a validation would count its time too."""
    return [
        (row.step, (row.step - before.step) * tokens_per_step / max(row.seconds - before.seconds, 1e-3))
        for before, row in pairwise(rows)
        if before.val_loss is None
    ]


def _speed(rows: Sequence[Row], tokens_per_step: int) -> float:
    speeds = sorted(speed for _, speed in _speeds(rows, tokens_per_step))
    if speeds:
        return speeds[len(speeds) // 2]
    return rows[-1].step * tokens_per_step / max(rows[-1].seconds, 1e-3)


def _layers(step: int, statistics: Sequence[Statistic]) -> list[str]:
    """A table of what quantization did in a step."""
    lines = [
        f"## Layers in step {step}",
        "",
        "SQNR in dB, underflow and overflow in percent of the numbers, by GEMM and operand.",
        "",
        "| layer | GEMM | operand | SQNR | underflow | overflow |",
        "|---|---|---|---|---|---|",
    ]
    for r in statistics:
        if (r.gemm, r.operand) not in DRAWN:
            continue
        shares = f"{100 * r.underflow:.2f} | {100 * r.overflow:.2f}"
        lines.append(f"| {r.layer} | {r.gemm} | {r.operand} | {r.sqnr:.1f} | {shares} |")
    return [*lines, ""]


def _draw(
    rows: Sequence[Row], statistics: Sequence[tuple[int, list[Statistic]]], tokens_per_step: int, path: Path
) -> None:
    import matplotlib  # takes a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#ebebeb",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, ((loss, speed), (sent, sqnr)) = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
        loss.plot([r.step for r in rows], [r.train_loss for r in rows], color="#0072B2", label="training")
        validated = [(r.step, r.val_loss) for r in rows if r.val_loss is not None]
        loss.plot(*zip(*validated, strict=True), "o-", color="#D55E00", markersize=4, label="validation")
        loss.set(title="Loss", ylabel="nats per byte", xlabel="steps")
        loss.legend()
        if speeds := _speeds(rows, tokens_per_step):
            speed.plot(*zip(*speeds, strict=True), "o-", markersize=3, color="#009E73")
        speed.set(title="Speed", ylabel="tokens/s", xlabel="steps", ylim=(0, None))
        for name, color in (("raw_bytes", "#707070"), ("sent_bytes", "#0072B2")):
            label = {"raw_bytes": "fp32", "sent_bytes": "sent"}[name]
            sent.plot([r.step for r in rows], [getattr(r, name) for r in rows], color=color, label=label)
        sent.set(title="Bytes sent by rank 0", xlabel="steps")
        sent.yaxis.set_major_formatter(lambda count, _: format_bytes(count))
        sent.legend()
        _draw_sqnr(sqnr, statistics)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_sqnr(axes: Axes, statistics: Sequence[tuple[int, list[Statistic]]]) -> None:
    """The last SQNR of each layer and operand; without any, an empty panel that says why."""
    axes.set(title="SQNR by layer, last measured", xlabel="layers in the order in which they run", ylabel="dB")
    if not statistics:
        axes.text(0.5, 0.5, "not measured: --monitor-every 0", ha="center", transform=axes.transAxes)
        return
    for (gemm, operand), color in zip(DRAWN, ("#0072B2", "#E69F00", "#D55E00"), strict=True):
        values = [r.sqnr for r in statistics[-1][1] if (r.gemm, r.operand) == (gemm, operand)]
        axes.plot(range(len(values)), values, "o-", color=color, markersize=3, label=operand)
    axes.legend()
