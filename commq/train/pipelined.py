"""The trainer of `--pipeline-stages`: the model's blocks dealt out to stages, whose boundaries travel encoded.

Ranks 0 to N - 1 are the stages of the first pipeline, the next N those of the second, and so on. The ranks of one stage
hold the same blocks and average their gradients by the recipe, as DDP does. The micro-batches of a step are those of
--accumulate.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

import commq
from commq.attach.pipeline import PipelineStage
from commq.codecs.formats import MIN_BLOCK, Format, get_format
from commq.stats import Stats
from commq.train.data import val_batches
from commq.train.model import GPT, VOCABULARY, next_byte_loss, rotation_table
from commq.train.optimizer import learning_rate, make_optimizer
from commq.train.ranks import Ranks
from commq.train.trainer import Trainer


class GPTStage(nn.Module):
    """A run of a GPT's blocks, with the embedding before the first and the output after the last.

    Its parameters are the GPT's own, and have the same names.
    """

    def __init__(self, gpt: GPT, index: int, count: int) -> None:
        super().__init__()
        layers = len(gpt.blocks)
        mine = range(index * layers // count, (index + 1) * layers // count)
        self.embedding = gpt.embedding if index == 0 else None
        self.blocks = nn.ModuleDict({str(number): gpt.blocks[number] for number in mine})
        self.norm = gpt.norm if index == count - 1 else None
        self.head = gpt.head if index == count - 1 else None
        self.head_width = gpt.head_width

    def forward(self, x: Tensor) -> Tensor:
        """x: tokens_BT, int64, for the first stage, else x_BTD. Returns x_BTD; the last stage logits_BTV."""
        x_BTD = x if self.embedding is None else self.embedding(x)
        rotation_TK = rotation_table(x_BTD.shape[1], self.head_width, x_BTD.device)
        for block in self.blocks.values():
            x_BTD = block(x_BTD, rotation_TK)
        return x_BTD if self.norm is None or self.head is None else self.head(self.norm(x_BTD))


class PipelineHandle:
    """What a stage exchanges: with its neighbours, and with the same stage of other pipelines."""

    def __init__(self, stage: PipelineStage, gradients: Any | None) -> None:
        self.stage, self.gradients = stage, gradients

    def stats(self) -> Stats:
        """Bytes of both. Steps, seconds and residuals are those of the gradients' exchange."""
        stats = Stats(steps=0, raw_bytes=0, sent_bytes=0, received_bytes=0, seconds=0.0, residual_norm=0.0)
        if self.gradients is not None:
            stats = self.gradients.stats()
        return replace(
            stats,
            raw_bytes=stats.raw_bytes + self.stage.raw_bytes,
            sent_bytes=stats.sent_bytes + self.stage.sent_bytes,
            received_bytes=stats.received_bytes + self.stage.received_bytes,
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"boundary": self.stage.boundary_state()}
        return state if self.gradients is None else state | {"gradients": self.gradients.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage.load_boundary_state(state["boundary"])
        if self.gradients is not None:
            self.gradients.load_state_dict(state["gradients"])


class PipelineTrainer(Trainer):
    """One rank of a run whose model is dealt out to stages."""

    def _attach(self, model: nn.Module, recipe: commq.Recipe) -> tuple[Any, Any, Optimizer]:
        config, ranks = self.config, self.ranks
        self._stages = config.pipeline.pipeline_stages
        self._pipeline, self._index = divmod(ranks.rank, self._stages)
        pipe, replicas = _groups(ranks, self._stages)
        assert isinstance(model, GPT)
        self.parameters = sum(p.numel() for p in model.parameters())
        part: nn.Module = GPTStage(model, self._index, self._stages)
        optimizer = make_optimizer(part, config.optimizer)
        gradients = None
        if dist.get_world_size(replicas) > 1:
            part = DistributedDataParallel(part, process_group=replicas)
            gradients = commq.register(part, recipe)
        self._stage = self._make_stage(part, pipe)
        self._schedule = ScheduleGPipe(self._stage, config.data.accumulate, loss_fn=next_byte_loss)
        return part, PipelineHandle(self._stage, gradients), optimizer

    def _make_stage(self, part: nn.Module, pipe: dist.ProcessGroup) -> PipelineStage:
        """Told the shapes, so that torch need not find them out: a DDP module must not run for that."""
        config, device = self.config, self.ranks.device
        shape, index = (config.data.batch, config.model.context), self._index
        inside = torch.empty(*shape, config.model.dim, device=device, requires_grad=True)
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
        logits = torch.empty(
            *shape,
            VOCABULARY,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            requires_grad=True,
        )
        return PipelineStage(
            part,
            index,
            self._stages,
            device,
            forward=_way(config.pipeline.pipeline_forward, config.model.dim),
            backward=_way(config.pipeline.pipeline_backward, config.model.dim),
            group=pipe,
            seed=config.seed,
            input_args=tokens if index == 0 else inside,
            output_args=logits if index == self._stages - 1 else inside,
        )

    @property
    def tokens_per_step(self) -> int:
        return super().tokens_per_step // self._stages

    def count_parameters(self) -> int:
        return self.parameters

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do the next step. Returns the loss, whose mean over all ranks is the step's, and the norm over all stages."""
        self.step += 1
        rate = learning_rate(self.step, self.config.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        micros = [self._train_batch(micro) for micro in range(self.config.data.accumulate)]
        tokens = torch.cat(micros).to(self.ranks.device)
        losses: list[Tensor] = []
        with self._autocast:
            self._schedule.step(*self._inputs(tokens), **self._targets(tokens), losses=losses)
        loss = torch.zeros((), device=self.ranks.device)
        if losses:
            loss = torch.stack(losses).mean().detach() * self._stages  # the other stages have none
        norm = self._norm()
        if self.config.optimizer.clip:
            clip_grads_with_norm_(self.ddp.parameters(), self.config.optimizer.clip, norm)
        self.optimizer.step()
        return loss, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the validation sequences over all pipelines, in whole batches, nats per byte."""
        data, pipelines = self.config.data, self.ranks.world_size // self._stages
        rows = data.batch * data.accumulate
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, batches
        for sequences in val_batches(
            self.corpus.val,
            count=max(1, data.val_sequences // (rows * pipelines)) * rows * pipelines,
            rank=self._pipeline,
            world_size=pipelines,
            rows=rows,
            context=self.config.model.context,
        ):
            tokens = sequences.to(self.ranks.device)
            losses: list[Tensor] = []
            with self._autocast:
                self._schedule.eval(*self._inputs(tokens), **self._targets(tokens), losses=losses)
            if losses:
                total += torch.tensor([torch.stack(losses).mean().item(), 1.0], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def common_state(self) -> dict[str, Any]:
        """Nothing but how far the run is: each rank has parameters of its own."""
        return self._progress()

    def own_state(self) -> dict[str, Any]:
        model = self.ddp.module if isinstance(self.ddp, DistributedDataParallel) else self.ddp
        return super().own_state() | {"model": model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, common: dict[str, Any], own: dict[str, Any]) -> None:
        super().load_state(common | {"model": own["model"], "optimizer": own["optimizer"]}, own)

    def _load_common(self, common: dict[str, Any]) -> None:
        model = self.ddp.module if isinstance(self.ddp, DistributedDataParallel) else self.ddp
        model.load_state_dict(common["model"])
        self.optimizer.load_state_dict(common["optimizer"])

    def fold(self, handles: list[dict[str, Any]]) -> dict[str, Any]:
        raise ValueError("--reshard with --pipeline-stages: ranks hold stages; continue with as many processes")

    def _inputs(self, tokens: Tensor) -> list[Tensor]:
        return [tokens[:, :-1].contiguous()] if self._index == 0 else []

    def _targets(self, tokens: Tensor) -> dict[str, Any]:
        return {"target": tokens[:, 1:]} if self._index == self._stages - 1 else {}

    def _norm(self) -> Tensor:
        """Of the gradients of all stages."""
        gradients = [p.grad for p in self.ddp.parameters() if p.grad is not None]
        squared = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squared, group=self._stage.group)
        return squared.sqrt()

    @property
    def _data_rank(self) -> int:
        return self._pipeline


def _way(name: str, width: int) -> Format | str:
    """The format of this name with blocks that divide a token's width, so that no token tells the one before it."""
    if name == "tiles" or get_format(name).kind == "raw":
        return name
    return get_format(name, block=max(MIN_BLOCK, min(get_format(name).block, width & -width)))


def _groups(ranks: Ranks, stages: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's pipeline, and the ranks of the same stage."""
    everyone = torch.arange(ranks.world_size).view(-1, stages)
    backend, found = dist.get_backend(ranks.group), []
    for members in (*everyone.tolist(), *everyone.T.tolist()):
        group = dist.new_group(members, backend=backend)
        if ranks.rank in members:
            found.append(group)
    return found[0], found[1]
