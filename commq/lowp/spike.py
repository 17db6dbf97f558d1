"""Loss spikes: losses that stand out from those before them. A pure function of the losses, so ranks agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 50
"""Losses that the running mean and deviation remember, about."""
ENOUGH = 20
"""Losses before the first that can be a spike."""


@dataclass(kw_only=True)
class SpikeDetector:
    """`observe` takes the loss of every step, averaged over all ranks, and says whether it is a spike.

    A spike is not finite, or above mean + deviations * (deviation of the losses, at least 1 % of the mean). Spikes do
    not enter the mean; MEMORY of them in a row are no spike but where the loss now is, and the mean starts anew.
    """

    deviations: float = 6.0
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    row: int = 0
    """Spikes since the last loss that was none."""

    def observe(self, loss: float) -> bool:
        if self._stands_out(loss):
            self.row += 1
            if self.row >= MEMORY:
                self.count, self.row = 0, 0
            return True
        self.row = 0
        self.count += 1
        gain = max(1.0 / self.count, 1.0 / MEMORY)
        distance = loss - self.mean
        self.mean += gain * distance
        self.variance = (1.0 - gain) * (self.variance + gain * distance * distance)
        return False

    def _stands_out(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        deviation = max(math.sqrt(self.variance), 0.01 * abs(self.mean))
        return self.count >= ENOUGH and loss > self.mean + self.deviations * deviation

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "variance": self.variance, "row": self.row}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.row = int(state["count"]), int(state["row"])
        self.mean, self.variance = state["mean"], state["variance"]
