"""Adaptation: a recipe's format as it is now, if it follows the gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from commq.codecs.formats import Format


class Adapter(Protocol):
    """How a format follows the gradients: pure functions of the step and of what all ranks measured."""

    def due(self, step: int) -> bool:
        """Whether the gradients of step number `step` are measured."""

    def measure(self, x_N: Tensor, mean_N: Tensor, fmt: Format) -> list[float]:
        """Numbers to add up over tensors and ranks: of a gradient, and of the mean that arrived; [] for nothing."""

    def adapted(self, fmt: Format, sums: list[float], world_size: int) -> Format:
        """The format from the next step on, in the same blocks."""


class Adaptation:
    """Measures in steps that are due, and changes the format when the step has ended. The same on all ranks."""

    def __init__(self, adapter: Adapter | None, fmt: Format) -> None:
        self._adapter, self._first = adapter, fmt
        self.format = fmt
        """What stands for the recipe's format now."""
        self._rows: list[list[float]] = []

    def due(self, step: int) -> bool:
        return self._adapter is not None and self._adapter.due(step)

    def now(self, fmt: Format) -> Format:
        """`fmt`, or what has become of it if it is the recipe's."""
        return self.format if fmt == self._first else fmt

    def measure(self, x_N: Tensor, mean_N: Tensor) -> None:
        """Take in a bucket of this rank's gradients, and the mean that arrived. Waits for the device."""
        if self._adapter is not None:
            self._rows += filter(None, [self._adapter.measure(x_N, mean_N, self.format)])

    def rows(self) -> list[list[float]]:
        """What this rank measured, to be shared with the others; forgotten here."""
        rows, self._rows = self._rows, []
        return rows

    def settle(self, shared: Iterable[list[list[float]]], world_size: int) -> bool:
        """Choose the format by the rows of all ranks, in rank order; true if it is another one."""
        sums = [sum(column) for column in zip(*(row for rows in shared for row in rows), strict=True)]
        before = self.format
        if self._adapter is not None and sums:
            self.format = self._adapter.adapted(before, sums, world_size)
        return self.format != before

    def state_dict(self) -> dict[str, Any]:
        fmt = self.format
        return {"name": fmt.name, "bits": fmt.bits, "levels": list(fmt.levels), "spread": fmt.spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a format that an adapter chose."""
        if self._adapter is not None:
            self.format = replace(self._first, **{**state, "levels": tuple(state["levels"])})
