"""What a run measures, as lines of metrics.jsonl and as TensorBoard scalars."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from commq.lowp.statistics import Statistic

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of metrics.jsonl."""

    step: int
    train_loss: float
    """Loss of this step before its update, mean over all ranks, nats per byte."""
    val_loss: float | None
    """Loss after this step's update, or None where there was no validation."""
    lr: float
    grad_norm: float
    """Norm of the averaged gradient before clipping."""
    raw_bytes: int
    """What rank 0 would have sent since the first step with fp32 gradients."""
    sent_bytes: int
    """What rank 0 sent since the first step."""
    residual_norm: float
    """2-norm of what rank 0 keeps for the next step by error feedback."""
    seconds: float
    """Time since the first step, without start-up; after a resume, added to that of the checkpoint."""


class Metrics:
    """Writes rows to the out folder. After a resume, rows later than `step` are dropped first."""

    def __init__(self, out: Path, step: int, *, tensorboard: bool) -> None:
        self._stream = _open(out / "metrics.jsonl", step)
        self._statistics = _open(out / "statistics.jsonl", step)
        self._events = _open(out / "events.jsonl", step)
        self._board = _open_board(out / "tensorboard", step) if tensorboard else None

    def write(self, row: Row) -> None:
        values = dataclasses.asdict(row)
        self._stream.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row.step)

    def write_statistics(self, step: int, statistics: Sequence[Statistic]) -> None:
        """What quantization did to each layer's operands in a step: a line of statistics.jsonl, and scalars."""
        rows = [dataclasses.asdict(each) for each in statistics]
        self._statistics.write(json.dumps({"step": step, "statistics": rows}) + "\n")
        if self._board is not None:
            for each in statistics:
                for name in ("sqnr", "underflow", "overflow"):
                    value = getattr(each, name)
                    if math.isfinite(value):
                        self._board.add_scalar(f"{name}/{each.gemm}/{each.operand}/{each.layer}", value, step)

    def write_event(self, step: int, event: str) -> None:
        """What the guard did: a line of events.jsonl."""
        self._events.write(json.dumps({"step": step, "event": event}) + "\n")
        if self._board is not None:
            self._board.add_text("events", event, step)

    def close(self) -> None:
        for stream in (self._stream, self._statistics, self._events):
            stream.close()
        if self._board is not None:
            self._board.close()


def read_rows(out: Path) -> list[Row]:
    """The rows of a run in the order of their steps."""
    return [Row(**json.loads(line)) for line in _complete_lines(out / "metrics.jsonl")]


def read_statistics(out: Path) -> list[tuple[int, list[Statistic]]]:
    """Steps and what was measured in them."""
    found = [json.loads(line) for line in _complete_lines(out / "statistics.jsonl")]
    return [(each["step"], [Statistic(**row) for row in each["statistics"]]) for each in found]


def read_events(out: Path) -> list[str]:
    """What the guard did, in words."""
    return [json.loads(line)["event"] for line in _complete_lines(out / "events.jsonl")]


def _open(path: Path, step: int) -> TextIO:
    """To append to; lines later than `step` are dropped first."""
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
    return path.open("a", buffering=1)


def _complete_lines(path: Path) -> list[str]:
    """All lines but one that a killed process left unfinished."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def check_tensorboard() -> None:
    """ValueError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError("TensorBoard is not installed; pip install tensorboard, or pass --no-tensorboard")


def _open_board(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    return SummaryWriter(str(folder), purge_step=step + 1)
