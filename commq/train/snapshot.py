"""A state of this rank in the memory of the host, to go back to without a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Snapshot:
    """Weights and buffers (this rank's shards of them), optimizer state, and the handle's residuals and counters."""

    def __init__(self, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer, handle: Any) -> None:
        self.step = step
        self._tensors = {name: _local(t).detach().to("cpu", copy=True) for name, t in _named(module)}
        self._optimizer = _copied(optimizer.state_dict())
        self._handle = _copied(handle.state_dict())

    @torch.no_grad()
    def restore(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, handle: Any) -> None:
        """Everything as it was, in place. All ranks call it with snapshots of one step."""
        for name, tensor in _named(module):
            _local(tensor).copy_(self._tensors[name])
        optimizer.load_state_dict(_copied(self._optimizer))
        handle.load_state_dict(_copied(self._handle))
        if hasattr(handle, "forget"):  # sharded parameters that travel as differences
            handle.forget()


def _named(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
