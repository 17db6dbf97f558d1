"""The trainer of `--tensor-parallel N --parallel fsdp`: what a rank holds of the blocks is sharded over its column."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from commq.train.sharded import ShardedTrainer
from commq.train.tensor import TensorTrainer


class ShardedTensorTrainer(TensorTrainer, ShardedTrainer):
    """To commq.FSDP, parts of the blocks are parameters like the others: it shards all over the ranks of a column.

    A rank saves its own shards.
    """

    def common_state(self) -> dict[str, Any]:
        """This rank's shards of parameters and of the optimizer's state."""
        optimizer = self.optimizer.state_dict()
        state = {number: {k: _local(v) for k, v in each.items()} for number, each in optimizer["state"].items()}
        model = {name: _local(tensor) for name, tensor in self.ddp.state_dict().items()}
        return self._progress() | {"model": model, "optimizer": optimizer | {"state": state}}

    @torch.no_grad()
    def _load_common(self, common: dict[str, Any]) -> None:
        for name, tensor in self.ddp.state_dict().items():
            _local(tensor).copy_(common["model"][name])
        self.optimizer.load_state_dict(common["optimizer"])
        for parameter, state in self.optimizer.state.items():
            moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
            state.update({k: _sharded_like(parameter, v) for k, v in moments.items()})


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _sharded_like(parameter: Tensor, local: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
