"""Phases: formats that hold for a time, before a recipe's own do. Warm-up, and bit widths that fall step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from commq.codecs.formats import Format


@dataclass(frozen=True, kw_only=True)
class Phase:
    """`format` for all parameters that are not exempt, for `steps` steps or until the loss is below `loss_below`."""

    format: Format
    answer: Format | None = None
    """Second hop; None: like the first."""
    steps: int = 0
    """Optimizer steps; 0: as many as it takes the loss."""
    loss_below: float | None = None
    """Ends the phase when a loss below this was observed, even if steps are left."""

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format) or not (self.answer is None or isinstance(self.answer, Format)):
            raise ValueError(f"phase: format={self.format!r}, answer={self.answer!r}; expected a commq.Format")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"phase steps={self.steps!r}: expected steps >= 0")
        if self.loss_below is not None and not math.isfinite(self.loss_below):
            raise ValueError(f"phase loss_below={self.loss_below}: expected a finite number")
        if not self.steps and self.loss_below is None:
            raise ValueError("a phase without steps and without loss_below would never end; give it one of them")


class Progress:
    """Which phase holds. The same on all ranks if all observe the same losses."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        self.index = 0
        """Number of the phase that holds; len(phases): the recipe's own formats do."""
        self._begun = 0
        self._loss = math.inf

    def at(self, step: int) -> int:
        """Number of the phase that holds in optimizer step number `step`; steps do not decrease."""
        while self.index < len(self.phases):
            phase = self.phases[self.index]
            over = phase.steps and step - self._begun >= phase.steps
            if not over and not (phase.loss_below is not None and self._loss < phase.loss_below):
                break
            self._begun = self._begun + phase.steps if over else step
            self.index += 1
            self._loss = math.inf
        return self.index

    @property
    def wants_loss(self) -> bool:
        """A phase that has not ended yet depends on the loss."""
        return any(phase.loss_below is not None for phase in self.phases[self.index :])

    def observe(self, loss: float) -> None:
        """Tell the phase a loss that all ranks agree on."""
        self._loss = min(self._loss, loss)

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.index, "begun": self._begun, "loss": self._loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index, self._begun, self._loss = state["phase"], state["begun"], state["loss"]
