"""Model, optimizer and compressed gradients of one rank: a step, a validation, and their state."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import commq
from commq.train.config import Config
from commq.train.data import Corpus, train_batch, val_batches
from commq.train.model import GPT, next_byte_loss
from commq.train.optimizer import learning_rate, make_optimizer
from commq.train.ranks import Ranks


class Trainer:
    """One rank of a run. `step` counts the finished steps; after each, all ranks hold the same weights."""

    def __init__(self, config: Config, recipe: commq.Recipe, corpus: Corpus, ranks: Ranks) -> None:
        self.config, self.corpus, self.ranks = config, corpus, ranks
        self.step = 0
        torch.manual_seed(config.seed)
        model = GPT(config.model).to(ranks.device)
        self.ddp, self.handle = self._attach(model, recipe)
        self.optimizer = make_optimizer(model, config.optimizer)
        self._autocast = torch.autocast("cuda", torch.bfloat16, enabled=ranks.device.type == "cuda")

    def _attach(self, model: torch.nn.Module, recipe: commq.Recipe) -> tuple[Any, Any]:
        """The model whose gradients travel by `recipe`, and its handle."""
        ddp = DistributedDataParallel(model, process_group=self.ranks.group)
        return ddp, commq.register(ddp, recipe)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks."""
        data = self.config.data
        return data.batch * data.accumulate * self.config.model.context * self.ranks.world_size

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do the next step. Returns this rank's loss and the averaged gradient's norm, on the device."""
        self.step += 1
        rate = learning_rate(self.step, self.config.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.ranks.device)
        accumulate = self.config.data.accumulate
        for micro in range(accumulate):
            travels = micro == accumulate - 1
            with nullcontext() if travels else self.ddp.no_sync():
                part = self._loss(self.ddp, self._train_batch(micro)) / accumulate
                part.backward()
            loss += part.detach()
        norm = clip_grad_norm_(self.ddp.parameters(), self.config.optimizer.clip or float("inf"))
        self.optimizer.step()
        return loss, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the fixed validation sequences over all ranks, nats per byte."""
        data = self.config.data
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, sequences
        for sequences in val_batches(
            self.corpus.val,
            count=data.val_sequences,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            rows=16,
            context=self.config.model.context,
        ):
            loss = self._loss(self.ddp.module, sequences)
            total += torch.tensor([loss.item() * len(sequences), len(sequences)], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def common_state(self) -> dict[str, Any]:
        """What is the same on every rank."""
        return {
            "step": self.step,
            "model": self.ddp.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def own_state(self) -> dict[str, Any]:
        """What this rank alone has."""
        state = {"handle": self.handle.state_dict(), "random": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return state

    def load_state(self, common: dict[str, Any], own: dict[str, Any]) -> None:
        """Continue from what `common_state` and `own_state` returned."""
        self.step = common["step"]
        self._load_common(common)
        self.handle.load_state_dict(own["handle"])
        torch.set_rng_state(own["random"])
        if "random_cuda" in own:
            torch.cuda.set_rng_state(own["random_cuda"], self.ranks.device)

    def fold(self, handles: list[dict[str, Any]]) -> dict[str, Any]:
        """This rank's handle state from those of another number of ranks."""
        residuals = commq.fold([handle["residual"] for handle in handles], self.ranks.world_size)
        return handles[min(self.ranks.rank, len(handles) - 1)] | {"residual": residuals[self.ranks.rank]}

    def _load_common(self, common: dict[str, Any]) -> None:
        self.ddp.module.load_state_dict(common["model"])
        self.optimizer.load_state_dict(common["optimizer"])

    def _loss(self, model: torch.nn.Module, sequences: Tensor) -> Tensor:
        sequences = sequences.to(self.ranks.device)
        with self._autocast:
            logits = model(sequences[:, :-1])
        return next_byte_loss(logits, sequences[:, 1:])

    def _train_batch(self, micro: int) -> Tensor:
        return train_batch(
            self.corpus.train,
            seed=self.config.seed,
            step=self.step,
            micro=micro,
            rank=self.ranks.rank,
            rows=self.config.data.batch,
            context=self.config.model.context,
        )
