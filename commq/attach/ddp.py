"""DistributedDataParallel: a communication hook that sends buckets of gradients encoded.

    handle = commq.register(ddp, "int4")                                        # one line
    ddp.register_comm_hook(commq.HookState("int4"), commq.comm_hook)            # PyTorch's own two

The hook averages: DDP sees the mean of the decoded gradients over ranks, the same bits on every rank. Clipping, norms
and GradScaler's search for infinities therefore run on what was really exchanged.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commq.attach.bucket import Bucket, Member, make_bucket
from commq.codecs.reference import Coding
from commq.collectives.message import Operand, make_messages
from commq.collectives.plan import RAW, raw_bytes
from commq.collectives.schedule import Exchange
from commq.collectives.transport import C10d, check_equal
from commq.collectives.two_shot import two_shot
from commq.feedback.residual import Residual
from commq.recipe import Recipe
from commq.recipe import recipe as get_recipe
from commq.stats import Stats


class HookState:
    """State of `comm_hook` on one rank: recipe, residuals, layout of every bucket, counters.

    recipe: a Recipe or its name. module: the DDP module, which names the parameters in checkpoints; without
    it they are numbered in the order in which buckets first show them. group: DDP's process group.
    """

    def __init__(
        self,
        recipe: Recipe | str,
        module: DistributedDataParallel | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "auto",
    ) -> None:
        if module is not None and group is None:
            group = module.process_group
        self.transport = C10d(group)
        self.recipe = _resolve(recipe, group)
        self.grad_scaler = grad_scaler
        self.backend = backend
        self.residual = Residual(self.recipe.feedback, self.recipe.format.block)
        self.step = 0
        self._raw_bytes = self._sent_bytes = 0
        self._clock = _Clock()
        self._members: dict[int, tuple[str, int]] = {}
        self._next_unit = 0
        self._numels: dict[str, int] = {}
        self._buckets: dict[int, tuple[tuple[int, ...], Bucket]] = {}
        self._side: torch.cuda.Stream | None = None
        if module is not None:
            for name, parameter in module.module.named_parameters():
                self._member(parameter, name)
                self._numels[name] = parameter.numel()

    def set_loss_scale(self, loss_scale: float) -> None:
        """Tell the residuals that the loss, and so the gradients, are multiplied by `loss_scale` from now on."""
        self.residual.set_loss_scale(loss_scale)

    def stats(self) -> Stats:
        """Totals so far. Waits for the device (the residual's norm, the clock)."""
        return Stats(
            steps=self.step,
            raw_bytes=self._raw_bytes,
            sent_bytes=self._sent_bytes,
            received_bytes=self._sent_bytes,
            seconds=self._clock.seconds(),
            residual_norm=self.residual.norm(),
        )

    def state_dict(self) -> dict[str, Any]:
        """This rank's step, counters and residuals: tensors and plain data. Every rank has its own."""
        return {
            "step": self.step,
            "raw_bytes": self._raw_bytes,
            "sent_bytes": self._sent_bytes,
            "residual": self.residual.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit. At another world size, `commq.fold` the residuals first.

        Raises ValueError if the state is of another recipe or, where the parameters are known, another model.
        """
        for name, values in state["residual"]["values"].items() if self._numels else ():
            if self._numels.get(name) != values.numel():
                raise ValueError(
                    f"rank {self.transport.rank}: the state's residual of {name!r} has {values.numel()} elements, "
                    f"the module's has {self._numels.get(name, 0)}; load the state of this model"
                )
        self.residual.load_state_dict(state["residual"])
        self.step, self._raw_bytes, self._sent_bytes = state["step"], state["raw_bytes"], state["sent_bytes"]

    def exchange(self, grads: GradBucket) -> Tensor:
        """Average a bucket over the ranks, in place."""
        buffer = grads.buffer()
        if self.transport.world_size > 1:
            if grads.index() == 0:
                self._begin_step()
            bucket = self._bucket(grads)
            with self._clock.running(buffer.device):
                self._run(bucket, buffer)
            self._raw_bytes += raw_bytes(buffer.numel(), self.transport.world_size)
            self._sent_bytes += sum(plan.sent_bytes for plan in bucket.plans)
        if grads.is_last():
            self.step += 1
        return buffer

    def _begin_step(self) -> None:
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            self.residual.set_loss_scale(self.grad_scaler.get_scale())
        if self.recipe.feedback.resets(self.step):
            self.residual.zero_()

    def _run(self, bucket: Bucket, buffer: Tensor) -> None:
        recipe, stored = self.recipe, bucket.residual
        coding = Coding(rounding=recipe.rounding, rotation=recipe.rotation, seed=recipe.seed, step=self.step)
        aligned, exempt = bucket.gather(buffer)
        operands = []
        if aligned is not None:
            operands.append(
                Operand(
                    aligned,
                    aligned,
                    coding,
                    blocks=bucket.blocks,
                    answer_blocks=bucket.answer_blocks,
                    residual_N=stored.values if stored else None,
                    residual_scales_G=stored.scales if stored else None,
                    decay=recipe.feedback.weight,
                )
            )
        if exempt is not None:
            operands.append(Operand(exempt, exempt, Coding()))
        messages = make_messages(bucket.plans, operands, self.transport, average=True, backend=self.backend)
        Exchange(map(two_shot, messages)).finish()
        bucket.scatter(buffer, aligned, exempt)
        if stored is not None and bucket.residual_padding is not None:
            stored.values[bucket.residual_padding] = 0

    def _bucket(self, grads: GradBucket) -> Bucket:
        parameters = grads.parameters()
        key = tuple(id(p) for p in parameters)
        known = self._buckets.get(grads.index())
        if known is not None and known[0] == key:
            return known[1]
        buffer = grads.buffer()
        if buffer.layout != torch.strided or any(p.is_complex() for p in parameters):
            raise TypeError(
                f"rank {self.transport.rank}: a bucket holds sparse or complex gradients, expected dense real ones; "
                "use Embedding(sparse=False) and real parameters, or keep those parameters out of this DDP module"
            )
        if buffer.dtype not in RAW:
            raise TypeError(
                f"rank {self.transport.rank}: gradients are {buffer.dtype}, expected float32, bfloat16 or float16"
            )
        members, offset, exempt = [], 0, self.recipe.exempt
        for p in parameters:
            name, first_unit = self._member(p)
            covered = self.recipe.format.kind != "raw" and exempt.covers(tuple(p.shape), p.numel())
            members.append(Member(name, offset, p.numel(), covered, first_unit))
            offset += p.numel()
        bucket = make_bucket(members, self.recipe, self.residual, world_size=self.transport.world_size, buffer=buffer)
        self._buckets[grads.index()] = key, bucket
        return bucket

    def _member(self, parameter: Tensor, name: str | None = None) -> tuple[str, int]:
        """Name and first unit of a parameter; new ones are numbered on."""
        if id(parameter) not in self._members:
            self._members[id(parameter)] = name or f"parameter.{len(self._members)}", self._next_unit
            self._next_unit += -(-parameter.numel() // self.recipe.unit)
        return self._members[id(parameter)]

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that exchanges run on, so that they overlap with backward."""
        if self._side is None:
            self._side = torch.cuda.Stream(device)
        return self._side


def comm_hook(state: HookState, bucket: GradBucket) -> Future[Tensor]:
    """DDP communication hook: the averaged bucket, exchanged by the state's recipe.

    On CUDA the exchange is queued on a side stream and the host goes on; on the CPU it is done on return.
    """
    buffer = bucket.buffer()
    if not buffer.is_cuda:
        done: Future[Tensor] = Future()
        done.set_result(state.exchange(bucket))
        return done
    side = state.side_stream(buffer.device)
    side.wait_stream(torch.cuda.current_stream(buffer.device))
    future: Future[Tensor] = Future(devices=[buffer.device])
    with torch.cuda.stream(side):
        future.set_result(state.exchange(bucket))  # DDP's wait orders its stream after the side stream
    return future


def register(
    ddp: DistributedDataParallel,
    recipe: Recipe | str,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    backend: str = "auto",
) -> HookState:
    """Send the gradients of `ddp` by `recipe`. Call it on every rank, before the first backward pass.

    recipe: a Recipe or one of `commq.recipes()`. grad_scaler: its scale is followed by the residuals (or call
    `handle.set_loss_scale` yourself). Returns the handle: `stats()`, `state_dict()`, `load_state_dict()`.
    Raises ValueError, the same on every rank, if the ranks' recipes differ; TypeError if `ddp` is no DDP module.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"register: got {type(ddp).__name__}, expected DistributedDataParallel; wrap the model in DDP first"
        )
    handle = HookState(recipe, ddp, grad_scaler=grad_scaler, backend=backend)
    ddp.register_comm_hook(handle, comm_hook)
    return handle


def _resolve(recipe: object, group: dist.ProcessGroup | None) -> Recipe:
    """The recipe that all ranks of `group` agree on; the same error on every rank if they do not."""
    failure: Exception | None = None
    try:
        resolved = get_recipe(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(resolved, Recipe):
            raise TypeError(f"recipe is a {type(recipe).__name__}, expected a commq.Recipe or the name of one")
    except (TypeError, ValueError) as error:
        failure = error
    check_equal("the recipe", str(failure) if failure else repr(resolved), group)
    if failure:
        raise failure
    assert isinstance(resolved, Recipe)
    return resolved


class _Clock:
    """Seconds spent in exchanges: host time on the CPU, event time on the stream on CUDA."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        self._collect(wait=False)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pairs.append((begin, end))

    def _collect(self, *, wait: bool) -> None:
        while self._pairs and (wait or self._pairs[0][1].query()):
            begin, end = self._pairs.pop(0)
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3

    def seconds(self) -> float:
        self._collect(wait=True)
        return self._seconds
