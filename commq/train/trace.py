"""Where a number that is not finite comes from: the first module that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def trace(module: nn.Module, passes: Callable[[], object]) -> str:
    """A sentence on the origin, the same on every rank. `passes` repeats the forward and backward pass that was bad.

    Looks at weights, then at the outputs of modules in the order in which they finish (so the innermost first), then at
    the gradients that modules hand on. All ranks call it; it waits for the device after every module.
    """
    # All ranks go on to the passes or none does: those of sharded weights are collective.
    return (
        _of_any_rank(_weight(module))
        or _of_any_rank(_origin(module, passes))
        or "it did not come back when the pass was repeated"
    )


def _of_any_rank(mine: str) -> str:
    """The first rank's sentence that is not empty."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = [f"rank {rank}: {text}" if len(everyone) > 1 else text for rank, text in enumerate(everyone) if text]
    return found[0] if found else ""


def _weight(module: nn.Module) -> str:
    """The first weight, or this rank's shard of one, that is not finite."""
    bad = (name for name, parameter in module.named_parameters() if not _finite([parameter]))
    return next((f"weight {name} is not finite" for name in bad), "")


def _origin(module: nn.Module, passes: Callable[[], object]) -> str:
    first: list[str] = []
    handles = []

    def watch(name: str, kind: str) -> Callable[..., None]:
        def hook(_: nn.Module, before: object, after: object) -> None:
            # forward: inputs and outputs; backward: gradients of inputs (made here) and of outputs (handed in)
            given, made = (before, after) if kind == "output" else (after, before)
            if not first and not _finite(_tensors(made)):
                origin = "from finite inputs" if _finite(_tensors(given)) else "from inputs that are not finite"
                first.append(f"{kind} of {name} is not finite, {origin}")

        return hook

    for name, each in module.named_modules():
        handles.append(each.register_forward_hook(watch(name or "the model", "output")))
        if not list(each.children()) and not isinstance(each, nn.Embedding):
            handles.append(each.register_full_backward_hook(watch(name, "input gradient")))
    try:
        passes()
    finally:
        for handle in handles:
            handle.remove()
    if first:
        return first[0]
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not _finite([p.grad])]
    return f"gradient of weight {bad[-1]} is not finite, its module's output and input gradient are" if bad else ""


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, list | tuple) else []


def _finite(tensors: Iterable[Tensor]) -> bool:
    floating = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in floating)
