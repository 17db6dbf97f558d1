"""Precision schedules: which policy holds in which step. A pure function of the step, so ranks and resumed runs agree.

""                          what the recipe says itself: fp4-tpt ends in bf16, the others stay as they are
"0.9=bf16"                  bf16 from 90 % of the steps on (target precision; arXiv 2502.11458)
"500=int8,0.5=fp8"          after 500 steps, then from half of them: staged
"cyclic=int4,int8,bf16:8"   8 times from the first precision up to the last one and back to the first (CPT,
                            arXiv 2101.09868: here the levels are precisions in place of widths)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from commq.lowp.policy import Policy, phases, policy


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A policy from a step on."""

    after: int
    """Steps done before it holds."""
    policy: Policy


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stages in order, the first after 0 steps; or levels that are gone through in cycles."""

    steps: int
    stages: tuple[Stage, ...] = ()
    levels: tuple[Policy, ...] = ()
    """From low to high precision."""
    cycles: int = 0

    def __post_init__(self) -> None:
        starts = [stage.after for stage in self.stages]
        if bool(self.stages) == bool(self.levels):
            raise ValueError("a precision schedule has either stages or levels")
        if self.stages and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= self.steps):
            raise ValueError(
                f"precision stages after {starts} of {self.steps} steps: expected the first after 0, ascending, and "
                "all before the last step"
            )
        if self.levels and not (len(self.levels) >= 2 and 1 <= self.cycles <= self.steps):
            raise ValueError(
                f"cyclic precision: {len(self.levels)} levels in {self.cycles} cycles of {self.steps} steps; expected "
                "at least 2 levels, and from 1 cycle to one for each step"
            )

    def at(self, step: int) -> Policy:
        """The policy of step 1, 2, ..."""
        if self.levels:
            return self.levels[self._level(step)]
        return next(stage.policy for stage in reversed(self.stages) if stage.after < max(step, 1))

    def policies(self) -> tuple[Policy, ...]:
        """All that can hold, each once."""
        return tuple(dict.fromkeys(self.levels or (stage.policy for stage in self.stages)))

    def _level(self, step: int) -> int:
        """rint((n - 1) / 2 * (1 - cos(pi t / T))) at step t of a cycle of T steps."""
        progress = (step - 1) * self.cycles / self.steps % 1.0
        return round(0.5 * (len(self.levels) - 1) * (1.0 - math.cos(math.pi * progress)))

    def __str__(self) -> str:
        if self.levels:
            return f"{self.cycles} cycles of {', '.join(level.name for level in self.levels)}"
        return ", ".join(f"{stage.policy.name} after {stage.after}" for stage in self.stages)


def schedule(text: str, precision: str | Policy, steps: int) -> Schedule:
    """The schedule that `text` (see above) describes for a run of `steps` that begins in `precision`.

    ValueError for what cannot be read, for unknown precisions, for stages outside of the run, and for cycles without
    `precision`.
    """
    start = policy(precision)
    if text.startswith("cyclic="):
        names, _, cycles = text.removeprefix("cyclic=").partition(":")
        if not cycles.isdigit():
            raise ValueError(f"schedule {text!r}: expected a number of cycles, as in cyclic=int4,int8,bf16:8")
        levels = tuple(policy(name) for name in names.split(","))
        if start not in levels:
            raise ValueError(
                f"schedule {text!r}: precision {start.name} is none of its levels and would never hold; expected one "
                f"of {', '.join(level.name for level in levels)}"
            )
        return Schedule(steps=steps, levels=levels, cycles=int(cycles))
    stages = [Stage(after=0, policy=start)]
    if text:
        stages += [_stage(part, steps, text) for part in text.split(",")]
    elif isinstance(precision, str):
        stages += [Stage(after=round(begin * steps), policy=later) for begin, later in phases(precision)[1:]]
    # In a run of a few steps a fraction may round to its beginning or its end.
    kept = [stage for stage in stages if stage.after < steps]
    later = [stage for stage, after in zip(kept, [*kept[1:], None], strict=True) if after is None or after.after > 0]
    return Schedule(steps=steps, stages=tuple(later))


def _stage(part: str, steps: int, text: str) -> Stage:
    begin, _, name = part.partition("=")
    try:
        after = int(begin) if begin.isdigit() else round(float(begin) * steps)
    except (ValueError, OverflowError):  # OverflowError: inf
        name = ""
    if not name:
        raise ValueError(f"schedule {text!r}: found {part!r}, expected step=precision or fraction=precision")
    if not begin.isdigit() and not 0.0 < float(begin) < 1.0:
        raise ValueError(f"schedule {text!r}: the fraction {begin} is not between 0 and 1; a step has no point")
    if begin.isdigit() and not 0 < after < steps:
        raise ValueError(f"schedule {text!r}: a stage after {after} of {steps} steps never holds, or always")
    return Stage(after=after, policy=policy(name))
