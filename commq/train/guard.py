"""The guard of a run: loss spikes, numbers that are not finite, and the way back to the last good state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from commq.lowp.spike import MEMORY, SpikeDetector
from commq.train.config_numerics import GuardConfig
from commq.train.snapshot import Snapshot
from commq.train.trace import trace

if TYPE_CHECKING:
    from commq.train.trainer import Trainer


class Guard:
    """Looks at every step between its backward pass and its update, the same on every rank.

    Costs a wait for the device and a small all-reduce in each step; rollback also two copies of weights, optimizer
    state and residuals in the memory of the host, one of them renewed every `snapshot_every` steps. A snapshot counts
    as good when the loss of the next step is no spike.
    """

    def __init__(self, config: GuardConfig, trainer: Trainer) -> None:
        self.config, self._trainer = config, trainer
        self.detector = SpikeDetector(deviations=config.spike_deviations)
        self.rollbacks: list[int] = []
        """Steps that went back, of the last ones."""
        self.excused = False
        """This step was not finite, and it has been dealt with."""
        self.events: list[str] = []
        """What happened, in words, since the run looked last."""
        self._good: Snapshot | None = None
        self._next: Snapshot | None = None

    def allows(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether the update of this step may be made. loss: this rank's; norm: of the averaged gradient.

        FloatingPointError, the same on every rank: the loss or gradient is not finite and there is no way back.
        """
        self.excused = False
        if self.config.guard == "off":
            return True
        trainer = self._trainer
        scales = self.config.loss_scale == "dynamic"  # then gradients may overflow: their step is skipped
        mean = _mean(loss, norm * 0.0 if not scales else torch.zeros_like(norm))
        if not self.detector.observe(mean):
            self._good, self._next = self._next or self._good, None
            return True
        step = trainer.step
        falls = trainer.control is not None and trainer.control.spike(step)
        what = f"step {step}: loss {mean:.4g}"
        origin = "" if torch.isfinite(torch.tensor(mean)) else trace(trainer.ddp, trainer.repeat)
        if self.config.guard == "rollback":
            self._roll_back(what, origin, falls)
            return False
        if origin:
            raise FloatingPointError(
                f"{what}, expected finite numbers; {origin}. Start again with a lower --lr, a longer --warmup or a "
                "higher --precision, or add --guard rollback"
            )
        self.events.append(f"{what} is a spike{self._after(falls)}")
        return True

    def excuse(self, event: str) -> None:
        """This step was not finite, and something else has dealt with it."""
        self.excused = True
        self.events.append(event)

    def end_step(self) -> None:
        """The update was made."""
        if self.config.guard == "rollback" and self._trainer.step % self.config.snapshot_every == 0:
            self._next = self._snapshot()

    def keep(self) -> None:
        """This state is in a checkpoint, or from one: what a run that resumes here could go back to."""
        if self.config.guard == "rollback":
            self._good, self._next = self._snapshot(), None

    def state_dict(self) -> dict[str, Any]:
        return {"detector": self.detector.state_dict(), "rollbacks": list(self.rollbacks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.rollbacks = list(state["rollbacks"])

    def _snapshot(self) -> Snapshot:
        trainer = self._trainer
        return Snapshot(trainer.step, trainer.ddp, trainer.optimizer, trainer.handle)

    def _roll_back(self, what: str, origin: str, falls: bool) -> None:
        trainer, config = self._trainer, self.config
        because = f"; {origin}" if origin else ""
        self.rollbacks = [step for step in self.rollbacks if step > trainer.step - MEMORY] + [trainer.step]
        if self._good is None or len(self.rollbacks) > config.max_rollbacks:
            reason = "there is no good state yet" if self._good is None else f"after {config.max_rollbacks} rollbacks"
            raise FloatingPointError(
                f"{what}{because}; {reason}; start again with a lower --lr, a longer --warmup or a higher --precision"
            )
        self._good.restore(trainer.ddp, trainer.optimizer, trainer.handle)
        self._next = None
        self.excused = True
        self.events.append(f"{what}{because}; back to the state after step {self._good.step}{self._after(falls)}")

    def _after(self, falls: bool) -> str:
        control = self._trainer.control
        if not falls or control is None or control.fallback is None:
            return ""
        return f"; {control.fallback.name} until step {control.until}"


def _mean(loss: Tensor, finite: Tensor) -> float:
    """The loss averaged over ranks; not finite if `finite` is not, on any rank."""
    total = torch.stack((loss.double(), finite.double() + loss.double() * 0.0)).cpu()
    dist.all_reduce(total)
    return float(total[0] / dist.get_world_size() + total[1])
