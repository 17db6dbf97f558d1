"""What trainers of models in parts have in common: parameters of which each rank holds its own, and their traffic."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from commq.collectives.functional import Group
from commq.collectives.traffic import traffic
from commq.stats import Stats
from commq.train.trainer import Trainer


class PartsTrainer(Trainer):
    """A trainer whose ranks hold different parameters, so that each saves its own."""

    def __init__(self, *args: Any) -> None:
        self.own: list[nn.Parameter] = []
        """Parameters that this rank alone holds; `own_group` is the ranks whose own ones make the model whole."""
        self.own_group: dist.ProcessGroup | None = None
        super().__init__(*args)

    @property
    def synchronized(self) -> bool:
        return False

    def count_parameters(self) -> int:
        others = dist.get_world_size(self.own_group) - 1
        return super().count_parameters() + others * sum(p.numel() for p in self.own)

    def _clip(self) -> Tensor:
        """Clip the averaged gradient of the whole model; its norm before that."""
        own = {id(parameter) for parameter in self.own}
        shared = [p for p in self.ddp.parameters() if id(p) not in own]
        square = _norm(self.own).square()
        dist.all_reduce(square, group=self.own_group)
        norm = (square + _norm(shared).square()).sqrt()
        clip_grads_with_norm_([*self.own, *shared], self.config.optimizer.clip or float("inf"), norm)
        return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    """Of whole gradients, where parameters are sharded."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class CountingHandle:
    """A handle whose statistics also have the bytes of activations, of tokens, and of their gradients."""

    def __init__(self, handle: Any, group: Group) -> None:
        self._handle, self._group = handle, group
        self._raw_before = self._sent_before = 0
        """Of the run before it was resumed."""

    def stats(self) -> Stats:
        """The raw bytes of activations are those of their own dtype; received bytes are of gradients alone."""
        stats: Stats = self._handle.stats()
        raw, sent = self._activations()
        return replace(stats, raw_bytes=stats.raw_bytes + raw, sent_bytes=stats.sent_bytes + sent)

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self._handle.state_dict(), "activations": list(self._activations())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._handle.load_state_dict(state["gradients"])
        raw, sent = self._activations()
        self._raw_before += state["activations"][0] - raw
        self._sent_before += state["activations"][1] - sent

    def _activations(self) -> tuple[int, int]:
        totals = traffic(self._group).values()
        raw = sum(each.forward_raw_bytes + each.backward_raw_bytes for each in totals)
        sent = sum(each.forward_bytes + each.backward_bytes for each in totals)
        return raw + self._raw_before, sent + self._sent_before

    def __getattr__(self, name: str) -> Any:
        found: Callable[..., Any] = getattr(self._handle, name)
        return found
