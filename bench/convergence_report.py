"""What the runs of bench/convergence.py say: paired gaps, and gates that they pass or fail."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convergence_lowp import BASE_UPDATE, BOUNDS, label_of
from convergence_run import Setting

BASELINE, CONTROL = "fp32", "int2"
DIRECT = "sdp4bit:weights_difference=false"
COARSE = f"{DIRECT},weights=int2"
ROUGH = "hybrid-shard:format=int2,feedback=none"
Row = dict[str, Any]
NAMES = asdict(Setting(recipe="", seed=0))
"""What a row has of its setting; rows of older files lack what there was not yet."""


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(row: Row) -> str:
    """What makes a run the same as another. Older files lack what there was not yet: it has its default."""
    found = {name: row.get(name, default) for name, default in NAMES.items()}
    for name in ("model", "optimizer"):
        found[name] = {key: found[name].get(key, default) for key, default in NAMES[name].items()}
    return json.dumps(found, sort_keys=True)


@dataclass(frozen=True)
class Gap:
    """A recipe against the uncompressed runs of the same seeds."""

    recipe: str
    bits: int
    losses: list[float]
    gaps: list[float]
    """Percent of the uncompressed run's validation loss, one for each seed; inf for a run that diverged."""
    ratio: float
    """Bytes sent / those of fp32."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN if it is not known."""
        return deviation(self.gaps) / len(self.gaps) ** 0.5

    def passes(self, bound: float) -> bool:
        return self.mean <= max(bound, 2 * self.error)


def deviation(values: list[float]) -> float:
    """Standard deviation; NaN of a single value, and where a run diverged."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def find_gaps(rows: list[Row]) -> list[Gap]:
    """Of every recipe with runs that have a partner."""

    def partner(row: Row) -> str:
        update = BASE_UPDATE.get(row["update"], row["update"])
        return key_of({**row, "recipe": BASELINE, "precision": "none", "update": update})

    base = {partner(row): row["val_loss"] for row in rows if key_of(row) == partner(row)}
    found = []
    for text in dict.fromkeys(label_of(row) for row in rows):
        pairs = [(row, base.get(partner(row))) for row in rows if label_of(row) == text]
        pairs = [(row, loss) for row, loss in pairs if loss is not None]
        if not pairs:
            continue
        losses = [_loss(row) for row, _ in pairs]
        gaps = [100 * (own - loss) / loss for own, (_, loss) in zip(losses, pairs, strict=True)]
        row = pairs[0][0]
        found.append(Gap(text, row["bits"], losses, gaps, row["sent_bytes"] / max(1, row["raw_bytes"])))
    return found


def _loss(row: Row) -> float:
    return float("inf") if row["val_loss"] is None else float(row["val_loss"])


@dataclass(frozen=True)
class Gate:
    """A bound in percent, and whom it concerns: one recipe, or the best of those with so many bits."""

    name: str
    bound: float
    recipe: str = ""
    bits: int = 0
    must_fail: bool = False

    def judge(self, gaps: list[Gap]) -> str:
        """One line; begins with PASS, FAIL or "----", if there is nothing to judge."""
        mine = [gap for gap in gaps if gap.recipe == self.recipe or (not self.recipe and gap.bits == self.bits)]
        if not mine:
            return f"----  {self.name}: no runs"
        best = min(mine, key=lambda gap: gap.mean)
        if len(best.gaps) < 2:
            return f"----  {self.name}: {best.recipe} has one seed, which says nothing about its error"
        limit = max(self.bound, 2 * best.error)
        passes = best.passes(self.bound)
        if self.must_fail:  # runs that diverge do so to very different losses
            passes = not passes or min(best.gaps) > self.bound
        must = "must exceed" if self.must_fail else "at most"
        return f"{'PASS' if passes else 'FAIL'}  {self.name}: {best.recipe} {best.mean:+.3f} %, {must} {limit:.3f} %"


GATES = (
    Gate("int8", 0.1, "int8"),
    Gate("int4, the default", 0.25, "int4"),
    Gate("best of 2 bits", 1.5, bits=2),
    Gate("best of 1 bit", 5.0, bits=1),
    Gate("control: 2 bits without feedback", 1.5, CONTROL, must_fail=True),
)


SHARDED_GATES = {
    "fsdp": (
        Gate("full-shard, the default where parameters are gathered twice", 0.25, "full-shard"),
        Gate("sdp4bit, the default where they are kept", 0.25, "sdp4bit"),
        *(Gate(name, 0.25, name) for name in ("zero++", "qsdp", "loco-two-hop")),
        Gate("control: weights in 4 bits, not as differences", 0.25, DIRECT, must_fail=True),
        Gate("control: weights in 2 bits, not as differences", 0.25, COARSE, must_fail=True),
    ),
    "hsdp": (
        Gate("hybrid-shard, the default between hosts", 0.25, "hybrid-shard"),
        Gate("control: 2 bits without feedback", 0.25, ROUGH, must_fail=True),
    ),
}
LOWP_GATES = (
    *(Gate(f"{name} GEMMs", bound, f"{name}+-") for name, bound in BOUNDS.items()),
    Gate("8-bit moments", 0.1, "-+adamw8bit"),
    Gate("FP8 moments", 0.1, "-+adamwfp8"),
    Gate("4-bit moments", 0.5, "-+adamw4bit"),
    Gate("fp8, 8-bit moments, int4 gradients", 0.5, "fp8+adamw8bit+int4"),
    Gate("control: int8, one scale a tensor, an outlier channel", 0.25, "int8-tensor@64+-", must_fail=True),
    Gate("control: int4, one scale a tensor", 1.5, "int4-tensor+-", must_fail=True),
    Gate("control: 4-bit second moments with a zero point", 0.5, "-+adamw4bit-zero", must_fail=True),
)


def report(rows: list[Row]) -> str:
    """Tables and gates: those of each setting, if there are several."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        update = BASE_UPDATE.get(row["update"], row["update"])
        same = {**row, "recipe": "", "seed": 0, "precision": "", "outlier": 0.0, "update": update}
        groups.setdefault(key_of(same), []).append(row)
    return "\n\n".join(_report(group) for group in groups.values())


def _report(rows: list[Row]) -> str:
    gaps = sorted(find_gaps(rows), key=lambda gap: (-gap.bits, gap.mean))
    first = rows[0]
    model, rate, sharding = first["model"], first["optimizer"]["lr"], first.get("parallel", "ddp")
    where = f" of {sharding}, hosts: {first['hosts']}" if sharding != "ddp" else ""
    lines = [
        f"{first['world_size']} ranks{where}, {first['steps']} steps of {first['update']} at {rate:g}, "
        f"{model['layers']} layers of {model['dim']}",
        f"{'recipe':<44} {'bytes':>6} {'val loss':>8} {'sd of seeds':>11} {'gap %':>8} {'std error':>9} {'seeds':>5}",
    ]
    for gap in gaps:
        lines.append(
            f"{gap.recipe:<44} {gap.ratio:6.3f} {statistics.fmean(gap.losses):8.4f} {deviation(gap.losses):11.4f} "
            f"{gap.mean:+8.3f} {gap.error:9.3f} {len(gap.gaps):>5}"
        )
    gates = GATES if sharding == "ddp" else SHARDED_GATES[sharding]
    lines += ["", "gates: gap <= max(bound, 2 standard errors)", *(gate.judge(gaps) for gate in gates)]
    if any(row.get("precision", "none") != "none" or row["update"] in BASE_UPDATE for row in rows):
        lines += [gate.judge(gaps) for gate in LOWP_GATES]
    return "\n".join(lines)
