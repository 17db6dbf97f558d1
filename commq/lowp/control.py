"""The precision of a run from step to step: its schedule, and another policy for a while after a loss spike."""

from __future__ import annotations

from typing import Any

from commq.lowp.convert import Conversion
from commq.lowp.policy import Policy
from commq.lowp.schedule import Schedule


class Control:
    """Switches a conversion's policies. All ranks call it with the same steps and the same spikes.

    fallback: the policy that holds for `fallback_steps` steps after a spike, then the schedule's holds again.
    Raises ValueError if a policy that may hold fits no layer.
    """

    def __init__(
        self, conversion: Conversion, schedule: Schedule, *, fallback: Policy | None = None, fallback_steps: int = 50
    ) -> None:
        self.conversion, self.schedule = conversion, schedule
        self.fallback, self.fallback_steps = fallback, fallback_steps
        self.until = 0
        """The last step of the fallback."""
        for policy in (*schedule.policies(), *([fallback] if fallback else ())):
            policy.choose(list(conversion.modules), conversion.blocks)

    def begin(self, step: int) -> Policy:
        """Set the policy of a step, before its first forward pass; returns it."""
        policy = self.schedule.at(step)
        if self.fallback is not None and step <= self.until:
            policy = self.fallback
        if policy != self.conversion.policy:
            self.conversion.set_policy(policy)
        return policy

    def spike(self, step: int) -> bool:
        """Step number `step` has seen a spike: fall back from the next one on. Returns whether there is a fallback."""
        if self.fallback is not None:
            self.until = step + self.fallback_steps
        return self.fallback is not None

    def state_dict(self) -> dict[str, Any]:
        return {"until": self.until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.until = int(state["until"])
