"""Which trainer a configuration asks for."""

from commq.train.config import Config
from commq.train.mixture import MixtureTrainer
from commq.train.sharded import ShardedTrainer
from commq.train.tensor import TensorTrainer
from commq.train.trainer import Trainer


def trainer_of(config: Config) -> type[Trainer]:
    """Config has refused what does not go together."""
    if config.experts:
        return MixtureTrainer
    if config.tensor_parallel > 1:
        return TensorTrainer
    return Trainer if config.parallel == "ddp" else ShardedTrainer
