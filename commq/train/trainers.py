"""Which trainer a configuration asks for."""

from commq.codecs.formats import get_format
from commq.train.config import Config
from commq.train.mixture import CHOICES, MixtureTrainer
from commq.train.sharded import ShardedTrainer
from commq.train.tensor import TensorTrainer
from commq.train.trainer import Trainer


def trainer_of(config: Config) -> type[Trainer]:
    """ValueError if the configuration asks for models in parts that do not go together."""
    if config.tensor_parallel == 1 and config.experts == 0:
        return Trainer if config.parallel == "ddp" else ShardedTrainer
    what = f"--experts {config.experts}" if config.experts else f"--tensor-parallel {config.tensor_parallel}"
    if config.tensor_parallel != 1 and config.experts:
        raise ValueError("--tensor-parallel with --experts: expected one of them")
    if config.tensor_parallel < 1 or (config.experts and config.experts < CHOICES):
        raise ValueError(f"{what}: expected 1 or more, of experts {CHOICES} or more")
    if config.parallel != "ddp" or config.optimizer.optimizer not in ("adamw", "sgd"):
        raise ValueError(
            f"{what} with --parallel {config.parallel} and --optimizer {config.optimizer.optimizer}: each process has "
            "parts of its own; expected ddp, and adamw or sgd"
        )
    if config.model.heads % config.tensor_parallel:
        raise ValueError(
            f"{what} with --heads {config.model.heads}: each process has some of the heads; choose a multiple of "
            f"{config.tensor_parallel}, and --dim a multiple of twice that"
        )
    get_format(config.activations)
    return MixtureTrainer if config.experts else TensorTrainer
