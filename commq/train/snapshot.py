"""A state of this rank in the memory of the host, to go back to without a file."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


class Snapshot:
    """Weights and buffers (this rank's shards of them), optimizer state, and the handle's residuals and counters."""

    def __init__(self, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer, handle: Any) -> None:
        self.step = step
        self._tensors = {name: _local(t).detach().to("cpu", copy=True) for name, t in _named(module)}
        self._optimizer = _saved(optimizer.state_dict())
        self._handle = _saved(handle.state_dict())

    @torch.no_grad()
    def restore(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, handle: Any) -> None:
        """Everything as it was, in place. All ranks call it with snapshots of one step."""
        for name, tensor in _named(module):
            _local(tensor).copy_(self._tensors[name])
        optimizer.load_state_dict(_restored(self._optimizer))
        handle.load_state_dict(_restored(self._handle))
        if hasattr(handle, "forget"):  # sharded parameters that travel as differences
            handle.forget()


class _Saved(NamedTuple):
    """A tensor on the host, and where it was."""

    local: Tensor
    device: torch.device
    sharded: tuple[DeviceMesh, tuple[Placement, ...], torch.Size, tuple[int, ...]] | None

    @staticmethod
    def of(tensor: Tensor) -> _Saved:
        local = _local(tensor.detach())
        sharded = None
        if isinstance(tensor, DTensor):
            sharded = tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride()
        return _Saved(local.to("cpu", copy=True), local.device, sharded)

    def tensor(self) -> Tensor:
        local = self.local.to(self.device, copy=True)
        if self.sharded is None:
            return local
        mesh, placements, shape, stride = self.sharded
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _named(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _saved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Saved.of(value)
    if isinstance(value, dict):
        return {key: _saved(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_saved(each) for each in value)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, _Saved):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _restored(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_restored(each) for each in value)
    return value
