"""When what is sent: pure functions of the step, so that all ranks agree without asking each other.

Steps are counted from 0 and are backward passes that exchange something or could have: a step that a GradScaler
skips counts, too, because the ranks made it together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["plain", "coded", "local"]
"""plain: gradients travel uncompressed. coded: what the optimizer makes of them, compressed. local: nothing."""


@dataclass(frozen=True, kw_only=True)
class VarianceRefreshes:
    """Steps at which the variance is refreshed with uncompressed gradients (0/1 Adam, section 4: T_v).

    The interval starts at 1 and doubles after every `doubling` refreshes; the last one is before `end`.
    """

    doubling: int = 16
    end: int

    def at(self, step: int) -> bool:
        """Whether step number `step` refreshes it."""
        if step >= self.end:
            return False
        start, interval = 0, 1
        while step >= start + self.doubling * interval:
            start += self.doubling * interval
            interval *= 2
        return (step - start) % interval == 0

    def count(self, step: int) -> int:
        """Refreshes in steps 0 to `step`, that one included."""
        step = min(step, self.end - 1)
        start, interval, count = 0, 1, 0
        while step >= start + self.doubling * interval:
            start += self.doubling * interval
            interval *= 2
            count += self.doubling
        return count + (step - start) // interval + 1


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """Steps at which ranks meet (0/1 Adam, section 4: T_u); the steps between are local.

    From step `begin` on the interval is 1; it doubles every `doubling` steps and stays at `longest`. Before `begin`
    all steps are common. Ranks also meet at the last step before an interval changes.
    """

    begin: int
    doubling: int
    longest: int = 16

    def at(self, step: int) -> bool:
        """Whether ranks meet at step number `step`."""
        if step < self.begin:
            return True
        stage, since = divmod(step - self.begin, self.doubling)
        last = (self.longest - 1).bit_length()
        if stage > last:
            stage, since = last, step - self.begin - last * self.doubling
        elif since == self.doubling - 1 and stage < last:
            return True
        return (since + 1) % min(2**stage, self.longest) == 0


def is_stable(now: float, before: float, ratio: float) -> bool:
    """Whether the norm of the variance changed by less than `ratio` (1-bit Adam, section 7.1: 0.96).

    The paper's v falls; here the smaller of both norms is compared with the larger, so one that rises counts, too.
    """
    return min(now, before) > 0.0 and min(now, before) >= ratio * max(now, before)
