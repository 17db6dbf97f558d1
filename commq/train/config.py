"""The configuration of a run: frozen dataclasses, one per stage; the command line is made from them."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from commq.train.config_numerics import GuardConfig, PrecisionConfig

LOW_BIT = ("adamw8bit", "adamw4bit", "adamwfp8")
"""Optimizers whose moments are codes."""
PLAIN = ("adamw", "sgd", *LOW_BIT)
"""Optimizers of gradients that have travelled; the others decide themselves what travels."""

_RECIPES = {"ddp": "int4", "fsdp": "full-shard", "hsdp": "hybrid-shard"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    layers: int = 3
    """Transformer blocks."""
    dim: int = 160
    """Width of the residual stream; a multiple of 2 * heads."""
    heads: int = 5
    """Attention heads per block."""
    context: int = 128
    """Bytes that the model sees at once."""

    def __post_init__(self) -> None:
        _require_positive(self, "layers", "dim", "heads", "context")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim={self.dim} is not a multiple of 2 * heads = {2 * self.heads}; "
                f"choose for example dim={2 * self.heads * max(1, round(self.dim / (2 * self.heads)))}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    data: Path | None = None
    """File or folder to train on, any bytes; by default the source code of Python's standard library."""
    max_mb: float = 32.0
    """Read at most this many MB (10**6 bytes)."""
    batch: int = 4
    """Sequences per process and micro-batch."""
    accumulate: int = 1
    """Micro-batches per step; gradients travel only after the last one."""
    val_sequences: int = 256
    """Sequences of the held-out part that each validation uses, over all processes together."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_mb", "batch", "accumulate", "val_sequences")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    optimizer: Literal[
        "adamw",
        "sgd",
        "adamw8bit",
        "adamw4bit",
        "adamwfp8",
        "onebit-adam",
        "onebit-lamb",
        "zero-one-adam",
        "birder",
        "ef-signsgd",
        "signsgd-mv",
    ] = "adamw"
    """adamw (betas 0.9 and 0.95) or sgd (momentum 0.9) on gradients that travel by the recipe; adamw8bit, adamw4bit
    and adamwfp8 keep the moments in codes; or one of those that decide themselves what travels, see commq.optim: they
    need no recipe."""
    lr: float = 2e-3
    """Peak learning rate; sgd wants about 25 times more than adamw."""
    momentum_format: str = "sign"
    """How the momentum of optimizers that send it travels: sign, int4, ..., or fp32 for the same rule uncompressed."""
    freeze_step: int = 0
    """Steps until onebit-adam, onebit-lamb and zero-one-adam freeze the variance; 0: a fifth of all steps,
    and no fewer than warmup."""
    warmup: int = 30
    """Steps over which the learning rate rises linearly from zero to its peak."""
    final_lr: float = 0.05
    """Learning rate at the last step as a fraction of the peak; a cosine leads there."""
    weight_decay: float = 0.1
    """Weight decay of the matrices; vectors have none."""
    clip: float = 1.0
    """Largest norm of the averaged gradient; larger ones are scaled down to it. 0 turns this off."""
    update_clipping: bool = False
    """adamw8bit, adamw4bit, adamwfp8: shorten steps whose gradients the second moment did not expect (StableAdamW)."""
    bf16_weights: bool = False
    """adamw8bit, adamw4bit, adamwfp8: bfloat16 weights without a float32 copy, rounded stochastically."""

    def __post_init__(self) -> None:
        _require_positive(self, "lr")
        for name in ("warmup", "final_lr", "weight_decay", "clip", "freeze_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; choose 0 or more")
        if (self.update_clipping or self.bf16_weights) and self.optimizer not in LOW_BIT:
            raise ValueError(
                f"--update-clipping and --bf16-weights are of {', '.join(LOW_BIT)}; found --optimizer {self.optimizer}"
            )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    out: Path = Path("out/run")
    """Folder for config, metrics and checkpoints; all processes must see the same folder."""
    resume: bool = False
    """Continue from the newest checkpoint in the out folder, bit for bit as if never interrupted; without
    one, start at the first step."""
    reshard: bool = False
    """Let --resume continue with another number of processes: residuals are folded so that their sum
    over the processes is kept. Not bit for bit: the batch of a step changes with the processes."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    val_every: int = 100
    """Steps between two validations; the last step is always validated."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints to keep."""
    tensorboard: bool = True
    """Write TensorBoard scalars to the out folder."""
    report: bool = True
    """Write report.md and report.png to the out folder when the run is complete."""

    def __post_init__(self) -> None:
        _require_positive(self, "log_every", "val_every", "checkpoint_every", "keep")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    pipeline_stages: int = 1
    """Stages that the blocks are dealt out to, one process each; with more processes, several pipelines share the data
    and average their gradients by the recipe. The micro-batches are those of --accumulate."""
    pipeline_forward: str = "int4"
    """How activations travel between stages: a format, or tiles (TAH-Quant)."""
    pipeline_backward: str = "int8"
    """How their gradients do."""

    def __post_init__(self) -> None:
        _require_positive(self, "pipeline_stages")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a small GPT on bytes with compressed gradients.

    Alone: one process. With several, start it with torchrun: each process takes one GPU and NCCL if
    there are enough of them on its machine, otherwise all use the CPU and gloo. Ctrl-C saves and stops.
    """

    recipe: str = "default"
    """How gradients, and sharded parameters, travel: one of commq.recipes(), or a file. By default int4 for ddp,
    full-shard for fsdp, hybrid-shard for hsdp. Nothing to optimizers that send a momentum."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every process has all parameters. fsdp: they are sharded over all processes; hsdp: over those of a host."""
    tensor_parallel: int = 1
    """Neighbouring processes that share the attention and the MLP of every block; the others take other sequences.
    With ddp or fsdp, which average gradients, and shard parameters, over processes that hold the same parts."""
    experts: int = 0
    """MLPs of each block, spread over all processes, of which a router chooses two for each token; 0: just one."""
    activations: str = "int8"
    """How activations travel with tensor_parallel, and tokens to their experts, forward and backward: bf16, int8,
    spike5, ..."""
    steps: int = 300
    """Optimizer steps in the whole run."""
    seed: int = 0
    """Seed of the initial weights, the data order and the random rounding."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lowp: PrecisionConfig = field(default_factory=PrecisionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _require_positive(self, "steps")
        if self.recipe == "default":
            object.__setattr__(self, "recipe", _RECIPES[self.parallel])
        if self.parallel != "ddp" and self.optimizer.optimizer not in PLAIN:
            raise ValueError(
                f"--optimizer {self.optimizer.optimizer} sends a momentum in place of gradients, which needs "
                f"--parallel ddp; with {self.parallel} choose one of {', '.join(PLAIN)}"
            )
        if self.optimizer.optimizer not in PLAIN and (
            self.guard.loss_scale != "none" or self.guard.guard == "rollback"
        ):
            raise ValueError(
                f"--optimizer {self.optimizer.optimizer} goes neither with --loss-scale nor with --guard rollback; "
                f"choose one of {', '.join(PLAIN)}"
            )
        if self.lowp.fallback != "none" and self.guard.guard == "off":
            raise ValueError("--fallback follows loss spikes, which --guard watch or --guard rollback looks for")

        self._check_stages()

    def _check_stages(self) -> None:
        stages = self.pipeline.pipeline_stages
        if stages > self.model.layers:
            raise ValueError(f"--pipeline-stages {stages} with --layers {self.model.layers}: a stage needs a block")
        if stages > 1 and (self.parallel != "ddp" or self.optimizer.optimizer not in ("adamw", "sgd")):
            raise ValueError(
                f"--pipeline-stages {stages} with --parallel {self.parallel} and --optimizer "
                f"{self.optimizer.optimizer}: expected ddp, and adamw or sgd"
            )

    def flat(self) -> dict[str, bool | int | float | str | None]:
        """Every field by its name on the command line; plain data."""
        values: dict[str, bool | int | float | str | None] = {}
        for owner in (self, self.model, self.data, self.optimizer, self.lowp, self.guard, self.pipeline, self.output):
            for item in dataclasses.fields(owner):
                value = getattr(owner, item.name)
                if not dataclasses.is_dataclass(value):
                    values[item.name] = str(value) if isinstance(value, Path) else value
        return values

    def numerics(self) -> dict[str, bool | int | float | str | None]:
        """The fields that decide the weights of step n; a resumed run must have the same.

        `steps` is one of them because the learning rate depends on it. The data path is not: the
        checkpoint holds a digest of the bytes themselves.
        """
        free = {"data", "val_sequences", "monitor_every"} | {item.name for item in dataclasses.fields(OutputConfig)}
        return {name: value for name, value in self.flat().items() if name not in free}


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} is not positive; choose a larger value")
