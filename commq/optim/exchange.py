"""What one rank sends for an optimizer: uncompressed gradients, or what the optimizer makes of them, or nothing.

It is the state of DDP's communication hook. While backward runs, each bucket of gradients is turned, in place, into
what is to travel (a momentum, say) and exchanged by `HookState`; `.grad` then holds the average over the ranks, the
same bits on each. What reads `.grad` between backward and step (clipping, GradScaler, a norm) sees that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commq.attach.ddp import HookState
from commq.collectives.plan import raw_bytes
from commq.collectives.transport import Transport
from commq.optim.phase import Mode
from commq.recipe import Recipe
from commq.stats import Stats


class Source(Protocol):
    """What an exchange asks of its optimizer."""

    plain_recipe: Recipe
    recipe: Recipe

    def mode(self, step: int) -> Mode:
        """What is sent in step number `step`."""

    def make_own(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state that every rank has for itself, at its beginning."""

    def fill(self, exchange: MomentumExchange, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Turn gradients into what travels, in place."""


class MomentumExchange:
    """One rank's exchange: recipes, residuals, counters, and state that no other rank has."""

    def __init__(
        self,
        optimizer: Source,
        named: Iterable[tuple[str, Tensor]],
        transport: Transport,
        *,
        module: DistributedDataParallel | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "auto",
    ) -> None:
        self.optimizer, self.transport, self.grad_scaler = optimizer, transport, grad_scaler
        self.names = {parameter: name for name, parameter in named}
        pairs = [(name, parameter) for parameter, name in self.names.items()]
        common: dict[str, Any] = {"transport": transport, "backend": backend, "named": pairs}
        self.plain = HookState(optimizer.plain_recipe, module, **common)
        self.coded = HookState(optimizer.recipe, module, **common)
        self.own = {parameter: optimizer.make_own(parameter) for parameter in self.names}
        """The optimizer's state of this rank alone, where ranks of one process share its other state."""
        self.step = 0
        """Steps whose backward pass has exchanged, or could have."""
        self.mode: Mode = "plain"
        """Of the step under way, or of the last one."""
        self.loss_scale = 1.0
        """What gradients are multiplied by in the step under way."""
        self._pending = self._discarded = False
        self._local_raw_bytes = 0
        self._views: dict[int, tuple[tuple[int, ...], list[Tensor]]] = {}
        self._before: list[tuple[list[Tensor], list[Tensor]]] = []

    def start(self, bucket: GradBucket) -> Future[Tensor]:
        """Start what this step does with a bucket, in place. Buckets come in rising order."""
        handle = self._prepare(bucket)
        if handle is not None:
            future = handle.start(bucket)
        else:
            buffer = bucket.buffer()
            future = Future(devices=[buffer.device]) if buffer.is_cuda else Future()
            future.set_result(buffer)
        self._count(bucket)
        return future

    def exchange(self, bucket: GradBucket) -> Tensor:
        """The same, and wait for it. On CUDA the current stream does."""
        handle = self._prepare(bucket)
        if handle is not None:
            handle.exchange(bucket)
        self._count(bucket)
        return bucket.buffer()

    def take(self) -> None:
        """The step is made with what was exchanged. RuntimeError if nothing was exchanged for it."""
        if not self._pending:
            raise RuntimeError(
                f"rank {self.transport.rank}: step() without an exchange since the last one, expected one backward "
                "pass outside of no_sync() before each step"
            )
        self._pending = False
        self._before.clear()

    def discard(self) -> None:
        """The gradients are given up: what was exchanged for a step that was not made does not count."""
        self._discarded = self._pending

    def stats(self) -> Stats:
        """Totals so far, with the bytes of DDP in fp32 as raw bytes. Waits for the device."""
        plain, coded = self.plain.stats(), self.coded.stats()
        return Stats(
            steps=self.step,
            raw_bytes=plain.raw_bytes + coded.raw_bytes + self._local_raw_bytes,
            sent_bytes=plain.sent_bytes + coded.sent_bytes,
            received_bytes=plain.received_bytes + coded.received_bytes,
            seconds=plain.seconds + coded.seconds,
            residual_norm=coded.residual_norm,
        )

    def restart(self, live: Mapping[str, Tensor]) -> None:
        """Forget the residuals; from now on only the elements in `live` are encoded (see `HookState.restart`)."""
        self.coded.restart(live)

    def state_dict(self) -> dict[str, Any]:
        """This rank's counters, residuals and own state: tensors and plain data. `commq.fold` takes "residual"."""
        coded = self.coded.state_dict()
        return {
            "step": self.step,
            "mode": self.mode,
            "local_raw_bytes": self._local_raw_bytes,
            "plain": self.plain.state_dict(),
            "residual": coded.pop("residual"),
            "coded": coded,
            "own": {self.names[p]: {key: t.clone() for key, t in own.items()} for p, own in self.own.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit. All ranks call it together."""
        self.plain.load_state_dict(state["plain"])
        self.coded.load_state_dict(state["coded"] | {"residual": state["residual"]})
        self.step, self.mode, self._local_raw_bytes = state["step"], state["mode"], state["local_raw_bytes"]
        self._pending = self._discarded = False
        self._before.clear()
        for parameter, name in self.names.items():
            for key, value in state["own"].get(name, {}).items():
                self.own[parameter][key].copy_(value)

    def _prepare(self, bucket: GradBucket) -> HookState | None:
        """Fill a bucket with what travels. What it travels by; None: it does not."""
        if bucket.index() == 0:
            self._begin()
        if self.mode == "plain":
            return self.plain
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if self.mode == "local":
            self._local_raw_bytes += raw_bytes(buffer.numel(), self.transport.world_size)
            return None
        if self.grad_scaler is not None:
            changes = self.coded.residuals(bucket) + [t for p in parameters for t in self.own[p].values()]
            self._before.append((changes, [tensor.clone() for tensor in changes]))
        self.optimizer.fill(self, parameters, self._split(bucket.index(), buffer, parameters))
        return self.coded

    def _count(self, bucket: GradBucket) -> None:
        if bucket.is_last():
            self.step += 1
            self._pending = True

    def _begin(self) -> None:
        if self._pending and self.mode != "plain":
            if not self._discarded:
                raise RuntimeError(
                    f"rank {self.transport.rank}: a second backward pass before step(), while .grad holds a momentum; "
                    "accumulate gradients under no_sync(), and call the optimizer's zero_grad() after a step that "
                    "was skipped"
                )
            for changed, before in self._before:
                torch._foreach_copy_(changed, before)
        self._before.clear()
        self._pending = self._discarded = False
        self.mode = self.optimizer.mode(self.step)
        scaler = self.grad_scaler
        self.loss_scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        if self.mode == "coded":
            self.coded.set_loss_scale(self.loss_scale)  # before residuals are put aside, all in the same unit

    def _split(self, index: int, buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Each parameter's place in the bucket, with the parameter's strides, as DDP lays it out."""
        key = (buffer.data_ptr(), *(id(p) for p in parameters))
        known = self._views.get(index)
        if known is None or known[0] != key:
            if known is not None:  # DDP has rebuilt its buckets, all of them
                self._views.clear()
            parts = buffer.split([p.numel() for p in parameters])
            views = [part.as_strided(p.shape, strides_of(p)) for part, p in zip(parts, parameters, strict=True)]
            known = self._views[index] = key, views
        return known[1]


def strides_of(parameter: Tensor) -> tuple[int, ...]:
    """The strides that a parameter's gradient has in a bucket: its own, if it fills its memory without gaps."""
    return torch.empty_like(parameter, device="meta").stride()


class FlatBucket:
    """All gradients of a module as one float32 vector, with the methods of DDP's GradBucket that are needed."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        numels = [p.numel() for p in parameters]
        self._buffer = torch.zeros(sum(numels), device=parameters[0].device)
        parts = self._buffer.split(numels)
        self.views = [part.as_strided(p.shape, strides_of(p)) for part, p in zip(parts, parameters, strict=True)]

    def buffer(self) -> Tensor:
        return self._buffer

    def index(self) -> int:
        return 0

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def is_last(self) -> bool:
        return True
