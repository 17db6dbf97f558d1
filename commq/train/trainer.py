"""Model, optimizer and compressed gradients of one rank: a step, a validation, and their state."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import commq
from commq.lowp.control import Control
from commq.lowp.statistics import Statistic
from commq.optim.exchange import MomentumExchange
from commq.optim.optimizer import CommOptimizer
from commq.train.config import Config
from commq.train.data import Corpus, train_batch, val_batches
from commq.train.guard import Guard
from commq.train.model import GPT, next_byte_loss
from commq.train.optimizer import learning_rate, make_comm_optimizer, make_optimizer
from commq.train.precision import check_layers, compile_blocks, make_control
from commq.train.ranks import Ranks


class Trainer:
    """One rank of a run. `step` counts the finished steps; after each, all ranks hold the same weights.

    But for the local steps of an optimizer that has them: then each rank saves its own.
    """

    def __init__(self, config: Config, recipe: commq.Recipe, corpus: Corpus, ranks: Ranks) -> None:
        self.config, self.corpus, self.ranks = config, corpus, ranks
        self.step = 0
        torch.manual_seed(config.seed)
        model = GPT(config.model).to(ranks.device, torch.bfloat16 if config.optimizer.bf16_weights else None)
        self.control: Control | None = make_control(model, config)
        if config.lowp.compile:
            compile_blocks(model)
        self.handle: Any
        self.optimizer: Optimizer
        self.ddp, self.handle, self.optimizer = self._attach(model, recipe)
        if self.control is not None:
            check_layers(self.control, self.ddp)
        self.recipe = self.optimizer.recipe if isinstance(self.optimizer, CommOptimizer) else recipe
        """How gradients travel, or what the optimizer sends in their place."""
        self._autocast = torch.autocast("cuda", torch.bfloat16, enabled=ranks.device.type == "cuda")
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.guard.loss_scale == "dynamic")
        if self.scaler.is_enabled() and not self.synchronized:
            raise ValueError("--loss-scale dynamic with a model in parts: ranks would skip different steps")
        self.guard = Guard(config.guard, self)
        self.statistics: list[Statistic] = []
        """What quantization did in this step, on rank 0, if it was watched."""

    def _attach(self, model: torch.nn.Module, recipe: commq.Recipe) -> tuple[Any, Any, Optimizer]:
        """The model whose gradients travel by `recipe`, its handle and its optimizer."""
        ddp = DistributedDataParallel(model, process_group=self.ranks.group)
        optimizer = make_comm_optimizer(ddp, self.config.optimizer, self.config.steps)
        if optimizer is not None:
            return ddp, optimizer.exchange, optimizer
        return ddp, commq.register(ddp, recipe), make_optimizer(model, self.config.optimizer, self.config.seed)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks."""
        data = self.config.data
        return data.batch * data.accumulate * self.config.model.context * self.ranks.world_size

    def count_parameters(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for p in self.ddp.parameters())

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do the next step. Returns this rank's loss and the norm of `.grad`, on the device.

        The norm is of the averaged gradient, or of what the optimizer exchanges in its place; in local steps, of this
        rank's own gradient.
        """
        self.step += 1
        if self.control is not None:
            self.control.begin(self.step)
        rate = learning_rate(self.step, self.config.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.handle.set_loss_scale(self.scaler.get_scale())
        with self._watching():
            loss = self._passes(travels=True)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        if self.guard.allows(loss, norm):
            self._update()
            self.guard.end_step()
        elif self.scaler.is_enabled():
            self.scaler.update()
        return loss, norm

    def _passes(self, *, travels: bool) -> Tensor:
        """Forward and backward of all micro-batches; their mean loss. travels: exchange gradients after the last."""
        loss = torch.zeros((), device=self.ranks.device)
        accumulate = self.config.data.accumulate
        for micro in range(accumulate):
            if self.control is not None:
                self.control.conversion.step(self.step * accumulate + micro)
            with nullcontext() if travels and micro == accumulate - 1 else self.ddp.no_sync():
                part = self._loss(self.ddp, self._train_batch(micro)) / accumulate
                self.scaler.scale(part).backward()
            loss += part.detach()
        return loss

    def repeat(self) -> None:
        """The passes of this step once more, for their numbers only."""
        self.optimizer.zero_grad()
        self._passes(travels=False)

    def _clip(self) -> Tensor:
        """Clip the averaged gradient, unless the optimizer has put something else there; its norm before that."""
        clip = self.config.optimizer.clip if getattr(self.optimizer, "clips", True) else 0.0
        return clip_grad_norm_(self.ddp.parameters(), clip or float("inf"))

    def _update(self) -> None:
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < scale:
            self.guard.excuse(f"step {self.step}: gradients overflow, loss scale {self.scaler.get_scale():g}")

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Measure what quantization does in this step, if it is time and on rank 0."""
        every = self.config.lowp.monitor_every
        self.statistics = []
        if self.control is None or not every or self.step % every or self.ranks.rank:
            yield
            return
        conversion = self.control.conversion
        conversion.watch()
        yield
        self.statistics = conversion.statistics()
        conversion.watch(False)

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

    @property
    def synchronized(self) -> bool:
        """All ranks hold the same weights."""
        return not isinstance(self.handle, MomentumExchange) or self.handle.mode != "local"

    def common_state(self) -> dict[str, Any]:
        """What is the same on every rank, if they are synchronized."""
        optimizer = self.optimizer.state_dict()
        optimizer.pop("exchange", None)  # this rank's own: the handle
        return {"model": self.ddp.module.state_dict(), "optimizer": optimizer} | self._progress()

    def _progress(self) -> dict[str, Any]:
        """How far the run is, and what has been decided on the way."""
        control = None if self.control is None else self.control.state_dict()
        return {
            "step": self.step,
            "control": control,
            "guard": self.guard.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def own_state(self) -> dict[str, Any]:
        """What this rank alone has."""
        state = {"handle": self.handle.state_dict(), "random": torch.get_rng_state()}
        if not self.synchronized:
            state["apart"] = self.common_state()
        if self.ranks.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return state

    def load_state(self, common: dict[str, Any], own: dict[str, Any]) -> None:
        """Continue from what `common_state` and `own_state` returned."""
        common = own.get("apart", common)
        self.step = common["step"]
        self.guard.load_state_dict(common["guard"])
        if self.control is not None:
            self.control.load_state_dict(common["control"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(common["scaler"])
        if isinstance(self.handle, MomentumExchange):
            self.ddp.module.load_state_dict(common["model"])
            self.optimizer.load_state_dict(common["optimizer"] | {"exchange": own["handle"]})
        else:
            self._load_common(common)
            self.handle.load_state_dict(own["handle"])
        torch.set_rng_state(own["random"])
        if "random_cuda" in own:
            torch.cuda.set_rng_state(own["random_cuda"], self.ranks.device)
        self.guard.keep()

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
            rank=self._data_rank,
            rows=self.config.data.batch,
            context=self.config.model.context,
        )

    @property
    def _data_rank(self) -> int:
        """Whose share of the data this rank reads."""
        return self.ranks.rank
