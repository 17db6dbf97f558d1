"""DistributedDataParallel: a communication hook that sends buckets of gradients encoded.

    handle = commq.register(ddp, "int4")                                        # one line
    ddp.register_comm_hook(commq.HookState("int4"), commq.comm_hook)            # PyTorch's own two

The hook averages: DDP sees the mean of the decoded gradients over ranks, the same bits on every rank. Clipping, norms
and GradScaler's search for infinities therefore run on what was really exchanged.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commq.attach.answer_residual import AnswerResidual
from commq.attach.bucket import Bucket, Coded, Member, bind_answers, make_bucket
from commq.codecs.reference import Coding
from commq.collectives.hosts import find_hosts
from commq.collectives.message import make_messages
from commq.collectives.plan import RAW, raw_bytes
from commq.collectives.route import Route, find_route
from commq.collectives.schedule import Exchange
from commq.collectives.transport import C10d, Transport, check_equal
from commq.feedback.residual import Residual
from commq.policy.phase import Progress
from commq.policy.rule import check_rules
from commq.recipe import Recipe
from commq.recipes import recipe as get_recipe
from commq.stats import Stats


class HookState:
    """State of `comm_hook` on one rank: recipe, residuals, layout of every bucket, counters.

    recipe: a Recipe or its name. module: the DDP module, which names the parameters in checkpoints; without
    it they are numbered in the order in which buckets first show them. group: DDP's process group. transport: what
    moves the bytes, in place of a group.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        module: DistributedDataParallel | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        transport: Transport | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "auto",
    ) -> None:
        if transport is None:
            transport = C10d(group if group is not None or module is None else module.process_group)
        self.transport = transport
        self.recipe = _resolve(recipe, transport)
        self.grad_scaler = grad_scaler
        self.backend = backend
        self.residual = Residual(self.recipe.feedback, self.recipe.format.block)
        self.answer_residual = AnswerResidual(self.transport) if self.recipe.answer_feedback.rule != "none" else None
        self.progress = Progress(self.recipe.phases)
        self.step = 0
        self._raw_bytes = self._sent_bytes = 0
        self._clock = _Clock()
        self._members: dict[int, tuple[str, int]] = {}
        self._next_unit = 0
        self._numels: dict[str, int] = {}
        self._live: dict[str, Tensor] = {}
        self._buckets: dict[tuple[int, int], tuple[tuple[int, ...], Bucket, Route]] = {}
        self._two_levels: bool | None = None
        self._side: torch.cuda.Stream | None = None
        if module is not None:
            for name, parameter in module.module.named_parameters():
                self._member(parameter, name)
                self._numels[name] = parameter.numel()
            check_rules(self.recipe.rules, self._numels)

    def restart(self, live: Mapping[str, Tensor]) -> None:
        """Begin anew without residuals, and encode only some elements of some parameters.

        live: by parameter name, the numbers (int64, rising, in memory order) of the elements that travel where the
        format is not raw. The others, which have to be zero on all ranks, stay as they are in the bucket and count in
        no block's scale: codes without a zero, such as sign, would move them. The same on all ranks.
        """
        self._live = dict(live)
        self._numels |= {name: index.numel() for name, index in live.items()}
        self._buckets.clear()
        self.residual = Residual(self.recipe.feedback, self.recipe.format.block)
        if self.answer_residual is not None:
            self.answer_residual = AnswerResidual(self.transport)

    def residuals(self, grads: GradBucket) -> list[Tensor]:
        """The tensors of feedback, of both hops, that exchanging this bucket will change."""
        if self.transport.world_size == 1:
            return []
        bucket, _ = self._bucket(grads)
        return [tensor for group in bucket.groups if isinstance(group, Coded) for tensor in group.residuals()]

    def set_loss_scale(self, loss_scale: float) -> None:
        """Tell the residuals that the loss, and so the gradients, are multiplied by `loss_scale` from now on."""
        self.residual.set_loss_scale(loss_scale)
        if self.answer_residual is not None:
            self.answer_residual.set_loss_scale(loss_scale)

    def observe(self, loss: float) -> None:
        """Tell phases that end by the loss what it is; every rank calls it, and the largest of their losses counts."""
        if self.progress.wants_loss:
            self.progress.observe(max(self.transport.share(float(loss))))

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
        answer = {} if self.answer_residual is None else {"answer": self.answer_residual.state_dict()}
        return {
            "step": self.step,
            "raw_bytes": self._raw_bytes,
            "sent_bytes": self._sent_bytes,
            "progress": self.progress.state_dict(),
            "residual": self.residual.state_dict() | answer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit. At another world size, `commq.fold` the residuals first.

        With feedback of the answer it is a collective: all ranks call it.
        Raises ValueError if the state is of another recipe or, where the parameters are known, another model.
        """
        for name, values in state["residual"]["values"].items() if self._numels else ():
            if self._numels.get(name) != values.numel():
                raise ValueError(
                    f"rank {self.transport.rank}: the state's residual of {name!r} has {values.numel()} elements, "
                    f"the module's has {self._numels.get(name, 0)}; load the state of this model"
                )
        self.residual.load_state_dict(state["residual"])
        if self.answer_residual is not None:
            self.answer_residual.load_state_dict(state["residual"]["answer"])
        self.progress.load_state_dict(state["progress"])
        self.step, self._raw_bytes, self._sent_bytes = state["step"], state["raw_bytes"], state["sent_bytes"]

    def exchange(self, grads: GradBucket) -> Tensor:
        """Average a bucket over the ranks, in place."""
        buffer = grads.buffer()
        if self.transport.world_size > 1:
            if grads.index() == 0:
                self._begin_step()
            sent_before = self.transport.memory.sent_bytes
            with self._clock.running(buffer.device):
                bucket, route = self._bucket(grads)
                self._run(bucket, route, buffer)
            self._raw_bytes += raw_bytes(buffer.numel(), self.transport.world_size)
            self._sent_bytes += self.transport.memory.sent_bytes - sent_before
        if grads.is_last():
            self.step += 1
            if self.answer_residual is not None:
                self.answer_residual.settle()
        return buffer

    def _begin_step(self) -> None:
        self.progress.at(self.step)
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            self.set_loss_scale(self.grad_scaler.get_scale())
        if self.recipe.feedback.resets(self.step):
            self.residual.zero_()

    def _run(self, bucket: Bucket, route: Route, buffer: Tensor) -> None:
        if not bucket.groups:
            return
        recipe = self.recipe
        tensors = bucket.gather(buffer)
        operands = [
            group.operand(x_N, self._coding(), recipe.feedback.weight)
            for group, x_N in zip(bucket.groups, tensors, strict=True)
        ]
        messages = make_messages(route.plans, operands, self.transport, average=True, backend=self.backend)
        Exchange(map(route.build, messages)).finish()
        bucket.scatter(buffer, tensors)

    def _coding(self) -> Coding:
        recipe = self.recipe
        return Coding(rounding=recipe.rounding, rotation=recipe.rotation, seed=recipe.seed, step=self.step)

    def _bucket(self, grads: GradBucket) -> tuple[Bucket, Route]:
        """Layout and route of a bucket, made when it, or the phase, is new."""
        parameters = grads.parameters()
        key, place = tuple(id(p) for p in parameters), (grads.index(), self.progress.index)
        known = self._buckets.get(place)
        if known is not None and known[0] == key:
            return known[1:]
        if known is not None:  # DDP has rebuilt its buckets, all of them
            self._buckets.clear()
            if self.answer_residual is not None:
                self.answer_residual.collect()
        buffer = grads.buffer()
        self._check(parameters, buffer)
        members, offset = [], 0
        for p in parameters:
            name, first_unit = self._member(p)
            fmt, answer = self.recipe.formats_of(name, tuple(p.shape), p.numel(), self.progress.index)
            live = self._live.get(name) if fmt.kind != "raw" else None
            numel = p.numel() if live is None else live.numel()
            members.append(Member(name, offset, numel, fmt, answer, first_unit, live))
            offset += p.numel()
        if self._two_levels is None:
            wants = self.recipe.schedule in ("two_hop", "auto")
            self._two_levels = wants and find_hosts(self.transport).has_two_levels
        bucket = make_bucket(
            members,
            self.recipe,
            self.residual,
            world_size=self.transport.world_size,
            buffer=buffer,
            two_levels=self._two_levels,
        )
        route = find_route(
            self.recipe.schedule,
            bucket.sources,
            self._coding(),
            self.transport,
            device=buffer.device,
            backend=self.backend,
        )
        if self.answer_residual is not None:
            bucket = bind_answers(bucket, route.plans, self.answer_residual, self.recipe.unit, buffer.device)
        self._buckets[place] = key, bucket, route
        return bucket, route

    def _check(self, parameters: list[Tensor], buffer: Tensor) -> None:
        if buffer.layout != torch.strided or any(p.is_complex() for p in parameters):
            raise TypeError(
                f"rank {self.transport.rank}: a bucket holds sparse or complex gradients, expected dense real ones; "
                "use Embedding(sparse=False) and real parameters, or keep those parameters out of this DDP module"
            )
        if buffer.dtype not in RAW:
            raise TypeError(
                f"rank {self.transport.rank}: gradients are {buffer.dtype}, expected float32, bfloat16 or float16"
            )

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
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    backend: str = "auto",
) -> HookState:
    """Send the gradients of `ddp` by `recipe`. Call it on every rank, before the first backward pass.

    recipe: a Recipe, or what `commq.recipe` takes: a name, a dict, a TOML or YAML file. grad_scaler: its scale is
    followed by the residuals (or call `handle.set_loss_scale` yourself). Returns the handle: `stats()`,
    `state_dict()`, `load_state_dict()`.
    Raises ValueError, the same on every rank, if the ranks' recipes differ; TypeError if `ddp` is no DDP module.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"register: got {type(ddp).__name__}, expected DistributedDataParallel; wrap the model in DDP first"
        )
    handle = HookState(recipe, ddp, grad_scaler=grad_scaler, backend=backend)
    ddp.register_comm_hook(handle, comm_hook)
    return handle


def _resolve(recipe: object, transport: Transport) -> Recipe:
    """The recipe that all ranks agree on; the same error on every rank if they do not."""
    failure: Exception | None = None
    try:
        resolved = get_recipe(recipe) if isinstance(recipe, str | Path | Mapping) else recipe
        if not isinstance(resolved, Recipe):
            raise TypeError(f"recipe is a {type(recipe).__name__}, expected a commq.Recipe, a name, a dict or a file")
    except (OSError, TypeError, ValueError) as error:
        failure = error
    check_equal("the recipe", str(failure) if failure else repr(resolved), transport)
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
