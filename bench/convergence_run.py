"""One run of bench/convergence.py: what it trains, and what it finds."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import commq
from commq.optim import LowBitAdamW
from commq.optim.moment_format import ROOT_4_ZERO
from commq.optim.optimizer import CommOptimizer
from commq.train.config import LOW_BIT, ModelConfig, OptimizerConfig
from commq.train.data import Corpus, load_corpus, train_batch, val_batches
from commq.train.model import GPT
from commq.train.optimizer import learning_rate, make_comm_optimizer
from convergence_lowp import make_control, plant_outlier
from recipe_text import read_recipe
from replicas import GradientUpdate, MomentumUpdate, Replicas, Update
from sharded_replicas import ShardedReplicas

MOMENTA = ("onebit-adam", "onebit-lamb", "zero-one-adam", "birder", "ef-signsgd", "signsgd-mv")
VALIDATIONS = 6
"""Times that a run is validated, the end included."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that decides the numbers of a run."""

    recipe: str
    """As `read_recipe` takes it; "fp32" is what the others are compared with. What travels by it says `update`."""
    seed: int
    update: str = "adamw"
    """One of UPDATES."""
    precision: str = "none"
    """Of the GEMMs of linear layers: a recipe of commq.lowp or a control (convergence_lowp.py)."""
    outlier: float = 0.0
    """How many times larger one channel is made, without changing what the model computes; 0: none is."""
    parallel: str = "ddp"
    """ddp; or what commq.fully_shard does: fsdp, or hsdp, which shares parameters out inside a host only."""
    hosts: int = 1
    """That the ranks pretend to be on, with fsdp and hsdp."""
    steps: int = 2000
    world_size: int = 4
    rows: int = 8
    """Sequences of a rank and step."""
    val_bytes: int = 1 << 19
    """Held-out bytes of a validation, the same in all runs."""
    max_mb: float = 32.0
    model: ModelConfig = field(default_factory=lambda: ModelConfig(layers=6, dim=384, heads=6, context=256))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1.5e-3, warmup=100))
    device: str = "cuda"


def _update_momenta(kind: str, setting: Setting, model: nn.Module) -> Update:
    """The recipe is the momentum's, so that fp32 is the same rule uncompressed."""
    config = replace(setting.optimizer, optimizer=kind)  # type: ignore[arg-type]
    recipe = read_recipe(setting.recipe, seed=setting.seed)

    def make(each: nn.Module) -> CommOptimizer:
        optimizer = make_comm_optimizer(each, config, setting.steps, recipe)
        assert optimizer is not None
        return optimizer

    copies = setting.world_size - 1 if kind == "zero-one-adam" else 0
    return MomentumUpdate([model, *(copy.deepcopy(model) for _ in range(copies))], make, config.clip)


def _update_lamb(setting: Setting, model: nn.Module) -> Update:
    """LAMB: OneBitLamb, which never freezes."""
    never = replace(setting.optimizer, freeze_step=setting.steps + 1)
    return _update_momenta("onebit-lamb", replace(setting, optimizer=never), model)


def _update_low_bit(kind: str, setting: Setting, model: nn.Module) -> GradientUpdate:
    return GradientUpdate(model, replace(setting.optimizer, optimizer=kind))  # type: ignore[arg-type]


def _with_zero_point(update: GradientUpdate) -> GradientUpdate:
    """The control: second moments that are rounded to zero."""
    assert isinstance(update.optimizer, LowBitAdamW)
    update.optimizer.root = ROOT_4_ZERO
    return update


UPDATES: dict[str, Callable[[Setting, nn.Module], Update]] = {
    "adamw": lambda setting, model: GradientUpdate(model, setting.optimizer),
    **{kind: partial(_update_low_bit, kind) for kind in LOW_BIT},
    "adamw4bit-zero": lambda setting, model: _with_zero_point(_update_low_bit("adamw4bit", setting, model)),
    **{kind: partial(_update_momenta, kind) for kind in MOMENTA},
    "lamb": _update_lamb,
}
"""What becomes of gradients, and what travels by the recipe: they, or what the optimizer makes of them."""


class Run:
    """A run on this process's device. `row` is what it found; so far, while it runs."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        self.corpus: Corpus = load_corpus(None, max_mb=setting.max_mb, context=setting.model.context)
        torch.manual_seed(setting.seed)
        self.model = GPT(setting.model).to(self.device)
        if setting.outlier:
            plant_outlier(self.model, setting.outlier)
        self.control = make_control(self.model, setting.precision, setting.seed, setting.steps)
        recipe = read_recipe(setting.recipe, seed=setting.seed)
        self.replicas = self._make_replicas(recipe)
        self.row: dict[str, Any] = {
            **asdict(setting),
            "resolved": str(recipe),
            "table": None if self.control is None else self.control.conversion.table(),
            "bits": recipe.format.bits,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "corpus": self.corpus.digest,
            "curve": [],
            "validation": [],
        }

    def execute(self) -> dict[str, Any]:
        """Train to the end, or until the loss is no longer finite."""
        steps, validate_every = self.setting.steps, max(1, self.setting.steps // VALIDATIONS)
        seconds = 0.0
        for step in range(1, steps + 1):
            start = time.perf_counter()
            if self.control is not None and self.control.schedule.at(step) != self.control.conversion.policy:
                self.control.begin(step)
                self.replicas.forget_graph()
            rate = learning_rate(step, steps, self.setting.optimizer)
            losses_W = self.replicas.step(self._tokens(step), rate)
            if step % 50 == 0 or step in (1, steps):
                loss = float(losses_W.mean())
                if not math.isfinite(loss):
                    break
                self.row["curve"].append([step, self.replicas.sent_bytes, seconds + time.perf_counter() - start, loss])
                self.replicas.observe(loss)
            seconds += time.perf_counter() - start
            if step == steps or (step % validate_every == 0 and steps - step >= validate_every):
                self.row["validation"].append([step, self.replicas.sent_bytes, seconds, self._validate()])
        finished = step == steps and math.isfinite(loss)
        self.row["steps_made"] = step
        self.row["val_loss"] = self.row["validation"][-1][3] if finished else None
        self.row["sent_bytes"], self.row["seconds"] = self.replicas.sent_bytes, seconds
        self.row["raw_bytes"] = self.replicas.raw_bytes
        return self.row

    def _make_replicas(self, recipe: commq.Recipe) -> Replicas | ShardedReplicas:
        setting = self.setting
        if setting.parallel != "ddp":
            return ShardedReplicas(
                recipe,
                self.model,
                setting.optimizer,
                setting.world_size,
                hosts=setting.hosts,
                hybrid=setting.parallel == "hsdp",
                dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            )
        update = UPDATES[setting.update](setting, self.model)
        conversion = None if self.control is None else self.control.conversion
        return Replicas(recipe, update, setting.world_size, conversion)

    def _tokens(self, step: int) -> Tensor:
        """int64 (W, B, T)."""
        setting = self.setting
        batches = [
            train_batch(
                self.corpus.train,
                seed=setting.seed,
                step=step,
                micro=0,
                rank=rank,
                rows=setting.rows,
                context=setting.model.context,
            )
            for rank in range(setting.world_size)
        ]
        tokens = torch.stack(batches)
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss of the fixed held-out bytes, nats per byte."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for sequences in self._held_out():
            total += self.replicas.loss(sequences.to(self.device)).double() * len(sequences)
            count += len(sequences)
        return float(total) / count

    def _held_out(self) -> Iterator[Tensor]:
        context = self.setting.model.context
        count = -(-self.setting.val_bytes // context)
        return val_batches(self.corpus.val, count=count, rank=0, world_size=1, rows=64, context=context)
