"""What bench/step.py compares: ways to make the gradients of all ranks one, each attached to a model as users do it."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler
from torch.autograd.profiler import record_function
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import commq
from commq.collectives.plan import ring_bytes
from host_parts import HOOK
from recipe_text import read_recipe
from step_peers import peer_hooks

DDP_OPTIONS = {
    "bucket_cap_mb": 25,
    "gradient_as_bucket_view": True,
    "init_sync": False,  # all ranks have made the same model
}
"""The same for all methods."""


@dataclass
class Attached:
    """A model whose backward pass leaves averaged gradients."""

    module: nn.Module
    sent_bytes: Callable[[int], int | None]
    """Bytes that this rank has sent in so many steps, all so far, by the method's own count; None if it has none."""
    buckets: dict[int, int] = field(default_factory=dict)
    """Elements of each bucket of the last step, by its number."""
    host_seconds: list[float] = field(default_factory=list)
    """Host time of the hook, one for each bucket of each step."""
    optimizer: torch.optim.Optimizer | None = None
    """One that decides what travels; None: AdamW."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    attach: Callable[[nn.Module], Attached]
    detail: str = ""
    warm_up: int = 3
    """Steps before it is as it will stay; DDP rebuilds its buckets after the first."""
    measures_link: bool = False
    """Its warm-up must see the link as it will be."""
    steps: int = 0
    """Steps after which everything has happened, for those whose steps differ: as many are timed."""


def ddp_methods(recipes: list[str], world_size: int) -> Iterator[Method]:
    """All methods under DistributedDataParallel, what costs nothing first."""
    noop, bf16 = debugging_hooks.noop_hook, default_hooks.bf16_compress_hook
    yield Method("no communication", partial(_hooked, None, noop, _none), "a hook that returns the bucket")
    yield Method("fp32", partial(_plain, partial(_ring, world_size, 4)), "plain DDP")
    yield Method("bf16 hook", partial(_hooked, None, bf16, partial(_ring, world_size, 2)), "torch's bf16_compress_hook")
    for rank in (4, 32):
        yield Method(f"PowerSGD rank {rank}", partial(_power_sgd, rank), "torch's powerSGD_hook", warm_up=4)
    for name, hook in peer_hooks():
        yield Method(name, partial(_hooked, None, hook, None))
    for text in recipes:
        recipe = read_recipe(text)
        yield Method(f"commq {text}", partial(_commq, recipe), str(recipe), measures_link=True)
    for block in (128, 256, 512):
        detail = f"OneBitAdam, frozen, blocks of {block}"
        yield Method(f"commq onebit-adam/{block}", partial(_onebit_adam, block), detail, warm_up=6, measures_link=True)
    meets = "ZeroOneAdam, ranks meet in every fifth step"
    yield Method("commq zero-one-adam", _zero_one_adam, meets, warm_up=12, steps=10, measures_link=True)


def _plain(sent: Callable[[nn.Module], int], model: nn.Module) -> Attached:
    attached, _ = _wrap(model)
    attached.sent_bytes = partial(operator.mul, sent(model))
    return attached


def _hooked(
    state: object, hook: Callable[..., Any], sent: Callable[[nn.Module], int] | None, model: nn.Module
) -> Attached:
    """sent: bytes of a step, where they are known."""
    attached, ddp = _wrap(model)
    ddp.register_comm_hook(state, hook)
    if sent is not None:
        attached.sent_bytes = partial(operator.mul, sent(model))
    return attached


def _ring(world_size: int, itemsize: int, model: nn.Module) -> int:
    """Bytes of plain all-reduces of the gradients, as rings."""
    return ring_bytes(sum(p.numel() for p in model.parameters()), itemsize, world_size)


def _none(model: nn.Module) -> int:
    return 0


def _power_sgd(rank: int, model: nn.Module) -> Attached:
    state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    return _hooked(state, powerSGD_hook.powerSGD_hook, None, model)


def _commq(recipe: commq.Recipe, model: nn.Module) -> Attached:
    attached, ddp = _wrap(model)
    handle = commq.register(ddp, recipe)
    attached.sent_bytes = lambda steps: handle.stats().sent_bytes
    return attached


def _onebit_adam(block: int, model: nn.Module) -> Attached:
    attached, ddp = _wrap(model)
    signs = commq.get_format("sign", block=block)
    return _paired(attached, commq.optim.OneBitAdam(ddp, lr=1e-4, freeze_step=2, momentum_format=signs))


def _zero_one_adam(model: nn.Module) -> Attached:
    attached, ddp = _wrap(model)
    optimizer = commq.optim.ZeroOneAdam(ddp, lr=1e-4, var_freeze_step=2, local_step_scaler=1, local_step_clipper=5)
    return _paired(attached, optimizer)


def _paired(attached: Attached, optimizer: Any) -> Attached:
    attached.optimizer = optimizer
    attached.sent_bytes = lambda steps: optimizer.exchange.stats().sent_bytes
    return attached


def _wrap(model: nn.Module) -> tuple[Attached, DistributedDataParallel]:
    """The model in DDP; a hook that is registered now is watched.

    The hook must not hold the module, which holds it where Python's collector does not look.
    """
    devices = None if next(model.parameters()).device.type == "cpu" else [torch.cuda.current_device()]
    ddp = DistributedDataParallel(model, device_ids=devices, **DDP_OPTIONS)
    attached = Attached(ddp, lambda steps: None)
    register, buckets, host_seconds = ddp.register_comm_hook, attached.buckets, attached.host_seconds

    def register_watched(state: object, hook: Callable[..., Any]) -> None:
        def watched(state, bucket):  # DDP would read annotations, and not understand strings
            buckets[bucket.index()] = bucket.buffer().numel()
            start = time.perf_counter()
            with record_function(HOOK) if profiler._is_profiler_enabled else nullcontext():
                future = hook(state, bucket)
            host_seconds.append(time.perf_counter() - start)
            return future

        register(state, watched)

    ddp.register_comm_hook = register_watched
    return attached, ddp
