"""A run from its first or its last saved step to its end: when to log, validate, save and stop."""

import json
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import commq
from commq.train.checkpoint import latest_checkpoint, load_common, load_own, save_checkpoint
from commq.train.config import Config
from commq.train.config_file import config_text
from commq.train.data import load_corpus
from commq.train.display import Display
from commq.train.metrics import Metrics, Row, check_tensorboard
from commq.train.precision import describe
from commq.train.ranks import Ranks, check_stages, compare_ranks
from commq.train.stop import Stop
from commq.train.trainers import trainer_of


class Run:
    """One rank's run, checked against the other ranks and against the checkpoint that it continues.

    ValueError, the same on every rank: data missing or too short, ranks that differ, an out folder that
    holds another run, or a checkpoint that this configuration cannot continue.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self._out = config.output.out
        self._seconds_before = 0.0
        self._place = {"ranks": str(ranks), "torch": str(torch.__version__)}
        self._facts: dict[str, Any] = config.numerics() | {"device": ranks.device.type}
        facts = config.flat() | self._facts
        error: Exception | None = None
        try:
            recipe = commq.recipe(config.recipe, seed=config.seed)
            precision = describe(config)
            check_stages(config.pipeline.pipeline_stages, ranks)
            corpus = load_corpus(config.data.data, max_mb=config.data.max_mb, context=config.model.context)
            checkpoint = self._find_checkpoint()
            if config.output.tensorboard:
                check_tensorboard()
            self._facts |= {
                "resolved recipe": repr(recipe),
                "resolved precision": precision,
                "digest of the data": corpus.digest,
            }
            facts |= self._facts | {"checkpoint": str(checkpoint)}
        except (ValueError, OSError) as problem:
            error = problem
        compare_ranks(facts, error)

        self.trainer = trainer_of(config)(config, recipe, corpus, ranks)
        self._say(f"{ranks}, torch {self._place['torch']}")
        self._say(f"data    {corpus}")
        self._say(f"model   {self.trainer.count_parameters() / 1e6:.2f} M parameters")
        self._say(f"recipe  {self.trainer.recipe}")
        if self.trainer.control is not None:
            self._say(f"lowp    {self.trainer.control.schedule}\n{self.trainer.control.conversion.table()}")
        self._say("config  " + " ".join(f"{name}={value}" for name, value in config.flat().items()))
        if checkpoint is not None:
            self._restore(checkpoint)
        if ranks.rank == 0:
            described = self._place | config.flat() | self._facts
            (self._out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
            (self._out / "config.toml").write_text(config_text(config))

    def execute(self) -> None:
        """Train to the last step, or until a signal asks all ranks to stop.

        FloatingPointError, the same on every rank: the loss or the gradient is no longer finite.
        """
        trainer, output, steps = self.trainer, self.config.output, self.config.steps
        stopping = False
        with ExitStack() as stack:
            sinks = [stack.enter_context(closing(sink)) for sink in self._open_sinks()]
            stop = stack.enter_context(Stop())
            start = time.perf_counter() - self._seconds_before
            while trainer.step < steps and not stopping:
                loss, norm = trainer.train_step()
                self._tell(sinks)
                stopping = stop.agreed()
                last = trainer.step == steps
                validates = last or trainer.step % output.val_every == 0
                saves = last or stopping or trainer.step % output.checkpoint_every == 0
                logs = validates or trainer.step % output.log_every == 0
                if logs or saves:
                    row = self._measure(loss, norm, start, validates=validates)
                if logs:
                    for sink in sinks:
                        sink.write(row)
                if saves:
                    self._save(row.seconds)
        if trainer.step < steps:
            self._say(f"stopped and saved at step {trainer.step}; continue with the same command and --resume")
        else:
            self._say(f"complete at step {trainer.step}: {self._out}")

    def _find_checkpoint(self) -> Path | None:
        """Where to continue; makes the out folder."""
        self._out.mkdir(parents=True, exist_ok=True)
        if not os.access(self._out, os.W_OK):
            raise ValueError(f"{self._out} is not writable; choose another --out")
        if self.config.output.resume:
            return latest_checkpoint(self._out / "checkpoints")
        if (self._out / "config.json").exists():
            raise ValueError(f"{self._out} already holds a run; add --resume to continue it, or choose another --out")
        return None

    def _open_sinks(self) -> list[Metrics | Display]:
        """What takes the rows on this rank."""
        if self.ranks.rank > 0:
            return []
        trainer, output = self.trainer, self.config.output
        display = Display(trainer.recipe.name, self.config.steps, trainer.step, trainer.tokens_per_step)
        return [Metrics(self._out, trainer.step, tensorboard=output.tensorboard), display]

    def _tell(self, sinks: list[Metrics | Display]) -> None:
        """What the step measured and what the guard did."""
        trainer = self.trainer
        metrics = [sink for sink in sinks if isinstance(sink, Metrics)]
        for event in trainer.guard.events:
            self._say(f"guard   {event}")
            for sink in metrics:
                sink.write_event(trainer.step, event)
        trainer.guard.events.clear()
        if trainer.statistics:
            for sink in metrics:
                sink.write_statistics(trainer.step, trainer.statistics)

    def _measure(self, loss: Tensor, norm: Tensor, start: float, *, validates: bool) -> Row:
        """The step that was just done, as a row; all ranks call it."""
        trainer = self.trainer
        # The second is NaN if any rank's norm is not finite: in local steps each rank has its own.
        totals = torch.tensor([loss.item() / self.ranks.world_size, norm.item() * 0.0], dtype=torch.float64)
        dist.all_reduce(totals)
        mean = totals[0]
        if not totals.isfinite().all() and not trainer.guard.excused:
            raise FloatingPointError(
                f"step {trainer.step}: loss {mean:.4g}, gradient norm {norm:.4g}, expected finite numbers; "
                "start again with a lower --lr or a longer --warmup"
            )
        val_loss = trainer.validate() if validates else None
        stats = trainer.handle.stats()
        return Row(
            step=trainer.step,
            train_loss=float(mean),
            val_loss=val_loss,
            lr=trainer.optimizer.param_groups[0]["lr"],
            grad_norm=float(norm),
            raw_bytes=stats.raw_bytes,
            sent_bytes=stats.sent_bytes,
            residual_norm=stats.residual_norm,
            seconds=round(time.perf_counter() - start, 3),
        )

    def _save(self, seconds: float) -> None:
        common = self.trainer.common_state() | {
            "facts": self._facts,
            "place": self._place,
            "world_size": self.ranks.world_size,
            "seconds": seconds,
        }
        save_checkpoint(
            self._out / "checkpoints",
            self.trainer.step,
            common,
            self.trainer.own_state(),
            keep=self.config.output.keep,
        )
        self.trainer.guard.keep()

    def _restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`, or say which field does not fit."""
        common = load_common(path)
        for name, value in self._facts.items():
            saved = common["facts"].get(name)
            if saved != value:
                raise ValueError(
                    f"{path} cannot be continued: {name} was {saved!r} and is now {value!r}; "
                    "start with the old value, or begin a new run with another --out"
                )
        rank, world_size, old_size = self.ranks.rank, self.ranks.world_size, common["world_size"]
        own = load_own(path, rank if rank < old_size else 0)
        if world_size != old_size:
            if not self.config.output.reshard:
                raise ValueError(
                    f"{path} is of {old_size} processes and there are now {world_size}; start {old_size}, "
                    "or pass --reshard to fold their residuals and go on with another batch per step"
                )
            if "apart" in own:
                raise ValueError(
                    f"{path} was saved by ranks that held different weights, parts of a model or between two meetings; "
                    f"continue with {old_size} processes, or from a checkpoint of a step at which they met"
                )
            own["handle"] = self.trainer.fold([load_own(path, old)["handle"] for old in range(old_size)])
        self.trainer.load_state(common, own)
        self._seconds_before = common["seconds"]
        self._say(f"resume  {path}")
        if common["place"] != self._place:
            self._say(f"note    not bit for bit: the checkpoint is of {common['place']}, this is {self._place}")

    def _say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line, flush=True)
