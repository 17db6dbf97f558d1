"""Which trainer a configuration asks for."""

from commq.codecs.formats import get_format
from commq.train.config import Config
from commq.train.config_numerics import GuardConfig, PrecisionConfig
from commq.train.mixture import CHOICES, MixtureTrainer
from commq.train.sharded import ShardedTrainer
from commq.train.tensor import TensorTrainer
from commq.train.tensor_sharded import ShardedTensorTrainer
from commq.train.trainer import Trainer


def trainer_of(config: Config) -> type[Trainer]:
    """ValueError if the configuration asks for models in parts with what does not go with them."""
    parts = {
        f"--pipeline-stages {config.pipeline.pipeline_stages}": config.pipeline.pipeline_stages > 1,
        f"--tensor-parallel {config.tensor_parallel}": config.tensor_parallel != 1,
        f"--experts {config.experts}": config.experts != 0,
    }
    asked = [what for what, wanted in parts.items() if wanted]
    if not asked:
        return Trainer if config.parallel == "ddp" else ShardedTrainer
    if len(asked) > 1:
        raise ValueError(f"{' with '.join(asked)}: expected one of them")
    (what,) = asked
    if config.lowp != PrecisionConfig() or config.guard != GuardConfig():
        raise ValueError(
            f"{what} with options of precision or of guards: a process has a part of the model; "
            "leave them at their defaults"
        )
    if config.pipeline.pipeline_stages > 1:
        from commq.train.pipelined import PipelineTrainer  # torch's pipelining takes seconds to import

        return PipelineTrainer
    if config.tensor_parallel < 1 or (config.experts and config.experts < CHOICES):
        raise ValueError(f"{what}: expected 1 or more, of experts {CHOICES} or more")
    ways = ("ddp",) if config.experts else ("ddp", "fsdp")
    if config.parallel not in ways or config.optimizer.optimizer not in ("adamw", "sgd"):
        raise ValueError(
            f"{what} with --parallel {config.parallel} and --optimizer {config.optimizer.optimizer}: each process has "
            f"parts of its own; expected {' or '.join(ways)}, and adamw or sgd"
        )
    if config.model.heads % config.tensor_parallel:
        raise ValueError(
            f"{what} with --heads {config.model.heads}: each process has some of the heads; choose a multiple of "
            f"{config.tensor_parallel}, and --dim a multiple of twice that"
        )
    get_format(config.activations)
    if config.experts:
        return MixtureTrainer
    return TensorTrainer if config.parallel == "ddp" else ShardedTensorTrainer
