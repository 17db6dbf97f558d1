"""DistributedDataParallel: a communication hook that sends buckets of gradients encoded.

    handle = commq.register(ddp, "int4")                                        # one line
    ddp.register_comm_hook(commq.HookState("int4"), commq.comm_hook)            # PyTorch's own two

The hook averages: DDP sees the mean of the decoded gradients over ranks, the same bits on every rank. Clipping, norms
and GradScaler's search for infinities therefore run on what was really exchanged.
"""

import functools
import logging
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.autograd import Variable
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commq.attach.agree import agree_on_recipe
from commq.attach.answer_residual import AnswerResidual
from commq.attach.bucket import Coded
from commq.attach.check import check_replicas
from commq.attach.dcp import pack_state, read_state
from commq.attach.flight import Flight
from commq.attach.layouts import Known, Layouts
from commq.collectives.capture import refuse_capture
from commq.collectives.plan import raw_bytes, ring_bytes
from commq.collectives.transport import C10d, Transport, check_equal
from commq.feedback.residual import Residual
from commq.policy.adaptation import Adaptation
from commq.policy.phase import Progress
from commq.policy.rule import check_rules
from commq.recipe import Recipe
from commq.stats import Stats

_CAPTURE = (
    "its step, phases and checks live on the host, and a replay would not move them; capture the step without DDP, "
    "with commq.all_reduce(..., schedule='two_shot', residual=...) on the gradients"
)
_log = logging.getLogger("commq")


class HookState:
    """State of `comm_hook` on one rank: recipe, residuals, layout of every bucket, counters.

    recipe: a Recipe or its name. module: the DDP module, which names the parameters in checkpoints; or `named`, names
    and parameters in its place; without either they are numbered in the order in which buckets first show them.
    group: DDP's process group. transport: what moves bytes in place of torch.distributed (all ranks' must agree).
    check_every: see `register`.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        module: DistributedDataParallel | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "auto",
        transport: Transport | None = None,
        check_every: int = 0,
        named: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        if check_every < 0 or (check_every and module is None):
            raise ValueError(
                f"check_every={check_every}, module={type(module).__name__}: expected steps >= 0 (0: never), and the "
                "DDP module, whose parameters are compared"
            )
        if module is not None and group is None:
            group = module.process_group
        self.transport: Transport = C10d(group) if transport is None else transport
        self.recipe = agree_on_recipe(recipe, [self.transport], _check_recipe)
        check_equal("check_every", str(check_every), self.transport)
        self.grad_scaler = grad_scaler
        self.check_every = check_every
        self.residual = Residual(self.recipe.feedback, self.recipe.format.block)
        self.answer_residual = AnswerResidual(self.transport) if self.recipe.answer_feedback.rule != "none" else None
        self.progress = Progress(self.recipe.phases)
        self.adaptation = Adaptation(self.recipe.adapt, self.recipe.format)
        self.step = 0
        self._raw_bytes = self._sent_bytes = 0
        self._layouts = Layouts(
            self.recipe, self.adaptation, self.transport, self.residual, self.answer_residual, backend
        )
        self._flight = Flight()
        self._bucket = -1
        """The last bucket of the step that has begun; -1: none has."""
        self._module = weakref.ref(module) if module is not None else None
        """DDP's reducer, which the module owns, holds this state."""
        self._numels: dict[str, int] = {}
        """Elements of each parameter that travel, as far as they are known."""
        for name, parameter in named if module is None else module.module.named_parameters():
            self._layouts.member(parameter, name)
            self._numels[name] = parameter.numel()
        self._all_numels = dict(self._numels)
        if self._numels:
            check_rules(self.recipe.rules, self._numels)

    def restart(self, live: Mapping[str, Tensor]) -> None:
        """Begin anew without residuals, and encode only some elements of some parameters.

        live: by parameter name, the numbers (int64, rising, in memory order) of the elements that travel where the
        format is not raw. The others, which have to be zero on all ranks, stay as they are in the bucket and count in
        no block's scale: codes without a zero, such as sign, would move them. The same on all ranks.
        """
        self._numels = self._all_numels | {name: index.numel() for name, index in live.items()}
        self.residual = Residual(self.recipe.feedback, self.recipe.format.block)
        if self.answer_residual is not None:
            self.answer_residual = AnswerResidual(self.transport)
        self._layouts.restart(self.residual, self.answer_residual, live)

    def residuals(self, grads: GradBucket) -> list[Tensor]:
        """The tensors of feedback, of both hops, that exchanging this bucket will change."""
        if self.transport.world_size == 1:
            return []
        is_new = self._layouts.find(grads, self.progress.index) is None
        with self._flight.on(grads.buffer().device, "residuals"):
            groups = self._find(grads).bucket.groups
        if is_new:
            self._flight.join(grads.buffer().device)
        return [tensor for group in groups if isinstance(group, Coded) for tensor in group.residuals()]

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
            seconds=self._flight.clock.seconds(),
            residual_norm=self.residual.norm(),
        )

    def write(self, writer: Any, step: int | None = None) -> None:
        """Write `stats()` as scalars named commq/..., for TensorBoard's SummaryWriter or what has its `add_scalar`.

        step: of the x axis; None: this handle's. Waits for the device.
        """
        stats = self.stats()
        scalars = {field.name: getattr(stats, field.name) for field in fields(stats)} | {"ratio": stats.ratio}
        for name, value in scalars.items():
            writer.add_scalar(f"commq/{name}", value, stats.steps if step is None else step)

    def state_dict(self) -> dict[str, Any]:
        """This rank's step, counters and residuals: tensors and plain data. Every rank has its own."""
        answer = {} if self.answer_residual is None else {"answer": self.answer_residual.state_dict()}
        return {
            "step": self.step,
            "raw_bytes": self._raw_bytes,
            "sent_bytes": self._sent_bytes,
            "progress": self.progress.state_dict(),
            "adaptation": self.adaptation.state_dict(),
            "residual": self.residual.state_dict() | answer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit. At another world size, `commq.fold` the residuals first.

        What is left of a step that an error broke off is forgotten. With feedback of the answer it is a collective:
        all ranks call it.
        Raises ValueError if the state is of another recipe or, where the parameters are known, another model.
        """
        for name, values in state["residual"]["values"].items() if self._numels else ():
            if self._numels.get(name) != values.numel():
                raise ValueError(
                    f"rank {self.transport.rank}: the state's residual of {name!r} has {values.numel()} elements, "
                    f"the module's has {self._numels.get(name, 0)}; load the state of this model"
                )
        self._flight.abandon()
        self._bucket = -1  # a step that was broken off
        self.residual.load_state_dict(state["residual"])
        if self.answer_residual is not None:
            self.answer_residual.load_state_dict(state["residual"]["answer"])
        self.progress.load_state_dict(state["progress"])
        self.adaptation.load_state_dict(state["adaptation"])
        self._layouts.forget()
        self.step, self._raw_bytes, self._sent_bytes = state["step"], state["raw_bytes"], state["sent_bytes"]

    def dcp_state(self) -> dict[str, Tensor]:
        """This rank's state for torch.distributed.checkpoint: `dcp.save({"model": ..., **handle.dcp_state()})`."""
        return pack_state(self.state_dict(), self.transport.rank)

    def load_dcp(self, path: str | Path) -> None:
        """Restore what `dcp.save` wrote to `path`, at any world size: the sum of residuals over ranks is kept.

        All ranks call it. To the bit at the same world size; see `commq.fold`. Raises as `load_state_dict`.
        """
        self.load_state_dict(read_state(path, self.transport.rank, self.transport.world_size))

    def stands_aside(self, ddp: DistributedDataParallel) -> bool:
        """Whether gradients of `ddp` are best left to DDP itself, which then sends them uncompressed, without a hook.

        Only by schedule auto, and measurement. All ranks ask together. Steps and bytes are counted by forward passes.
        """
        named = ddp.module.named_parameters()
        parameters = [p for name, p in named if p.requires_grad and name not in ddp.parameters_to_ignore]
        auto = self.recipe.schedule == "auto" and not self.recipe.phases and self.recipe.adapt is None
        # Forward passes cannot compare replicas: ranks may make different ones, in join() or to validate.
        if not auto or self.check_every or self.transport.world_size == 1 or not parameters:
            return False
        if not self._layouts.loses(parameters, int(ddp.bucket_bytes_cap)):
            return False
        numel, itemsize = sum(p.numel() for p in parameters), parameters[0].element_size()

        @torch.compiler.disable
        def count(module: Any, _: Any) -> None:
            if torch.is_grad_enabled() and module.require_backward_grad_sync:
                self.step += 1
                self._raw_bytes += raw_bytes(numel, self.transport.world_size)
                self._sent_bytes += ring_bytes(numel, itemsize, self.transport.world_size)

        ddp.register_forward_pre_hook(count)
        if self.transport.rank == 0:
            _log.warning(
                "commq: schedule auto registers no hook: by measurement, compression of %d bytes of gradients with %s "
                "would be slower than DDP's own all-reduce, so they travel uncompressed",
                numel * itemsize,
                self.recipe.format,
            )
        return True

    def exchange(self, grads: GradBucket) -> Tensor:
        """Average a bucket over the ranks, in place, and wait for it. On CUDA the current stream does."""
        future = self.start(grads)
        if not future.done():
            with self._flight.on(grads.buffer().device, "land"):
                self._land()
        return future.wait()

    def start(self, grads: GradBucket) -> Future[Tensor]:
        """Start to average a bucket over the ranks, in place; the last bucket of a step waits for all.

        Buckets come in rising order. If one does not, the step before was broken off, by an error in backward: what
        is left of it is forgotten.
        """
        buffer = grads.buffer()
        refuse_capture("commq's hook of DDP", _CAPTURE, buffer.device)
        future: Future[Tensor] = Future(devices=[buffer.device]) if buffer.is_cuda else Future()
        try:
            index = grads.index()
            with self._flight.on(buffer.device, f"bucket {index}"):
                if index <= self._bucket:
                    self._end_step()
                if self._bucket < 0:
                    self._begin_step(buffer.device)
                self._bucket = index
                if self.transport.world_size > 1:
                    self._add(grads, buffer, future)
                else:
                    future.set_result(buffer)
                if grads.is_last():
                    self._land()
                    self._adapt()
                    self._end_step()
        except BaseException:
            self._flight.abandon()
            raise
        return future

    def _add(self, grads: GradBucket, buffer: Tensor, future: Future[Tensor]) -> None:
        known = self._find(grads)
        sent_before = self.transport.memory.sent_bytes
        laid = self._layouts.lay(known, buffer)
        own = buffer.clone() if self.adaptation.due(self.step) else None

        def arrived() -> None:
            if own is not None:
                self.adaptation.measure(own, buffer)
            future.set_result(buffer)

        self._flight.add(laid, known.route, self.step, arrived)
        self._raw_bytes += raw_bytes(buffer.numel(), self.transport.world_size)
        self._sent_bytes += self.transport.memory.sent_bytes - sent_before

    def _find(self, grads: GradBucket) -> Known:
        known = self._layouts.find(grads, self.progress.index)
        if known is None:
            self._land()
            known = self._layouts.make(grads, self.progress.index)
        return known

    def _land(self) -> None:
        sent_before = self.transport.memory.sent_bytes
        self._flight.land()
        self._sent_bytes += self.transport.memory.sent_bytes - sent_before

    def _begin_step(self, device: torch.device) -> None:
        self.progress.at(self.step)
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            self.set_loss_scale(self.grad_scaler.get_scale())
        if self.recipe.feedback.resets(self.step):
            self.residual.zero_()
        module = self._module() if self._module is not None else None
        _check_join(module)
        if module is not None and self.check_every and self.step and self.step % self.check_every == 0:
            check_replicas(dict(module.module.named_parameters()), self.transport, self.step - 1)
        if (module is None or getattr(module, "skip_all_reduce_unused_params", False)) and _in_backward():
            # DDP may leave out the last bucket; this runs before it waits for the others.
            Variable._execution_engine.queue_callback(functools.partial(self._end_backward, self.step, device))

    def _end_backward(self, step: int, device: torch.device) -> None:
        if self._bucket >= 0 and self.step == step:
            with self._flight.on(device, "land"):
                self._land()
                if self._module is not None:  # else it may be a part of backward, checkpointed
                    self._adapt()
                    self._end_step()

    def _adapt(self) -> None:
        """The format of the next step, by what all ranks measured in this one."""
        if self.adaptation.due(self.step):
            shared = self.transport.share(self.adaptation.rows())
            if self.adaptation.settle(shared, self.transport.world_size):
                self._layouts.forget()

    def _end_step(self) -> None:
        self._flight.end_step()  # nothing is left, but of a step that was broken off
        self._bucket = -1
        self.step += 1
        self._layouts.settle()


def comm_hook(state: HookState, bucket: GradBucket) -> Future[Tensor]:
    """DDP communication hook: the averaged bucket, exchanged by the state's recipe.

    It starts the bucket, lets those before it go on, and returns; the hook of the last bucket waits for all (on CUDA a
    side stream does). So buckets travel while backward computes the next.
    """
    return state.start(bucket)


def register(
    ddp: DistributedDataParallel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    backend: str = "auto",
    check_every: int = 0,
) -> HookState:
    """Send the gradients of `ddp` by `recipe`. Call it on every rank, before the first backward pass.

    recipe: a Recipe, or what `commq.recipe` takes: a name, a dict, a TOML or YAML file. grad_scaler: its scale is
    followed by the residuals (or call `handle.set_loss_scale` yourself). check_every: before every so many steps,
    compare the bits of all ranks' parameters; ReplicaError, the same on every rank, names the first that differs
    (0: never; it waits for the device). Returns the handle: `stats()`, `write()`, `state_dict()`, `load_state_dict()`.
    Schedule "auto" measures first; where no bucket would gain, no hook is registered (but with check_every), and DDP
    goes on as it is.
    Raises ValueError, the same on every rank, if the ranks' recipes or check_every differ; TypeError if `ddp` is no
    DDP module.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"register: got {type(ddp).__name__}, expected DistributedDataParallel; wrap the model in DDP first"
        )
    handle = HookState(recipe, ddp, grad_scaler=grad_scaler, backend=backend, check_every=check_every)
    if not handle.stands_aside(ddp):
        ddp.register_comm_hook(handle, comm_hook)
    return handle


def _check_recipe(recipe: Recipe) -> None:
    if recipe.is_for_shards:
        raise ValueError(
            f"recipe {recipe.name!r} says how sharded parameters travel, which DDP does not send; use it with "
            "commq.FSDP, or weights=None, secondary=False"
        )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _check_join(module: DistributedDataParallel | None) -> None:
    """All ranks are in `join` together, so all raise."""
    if module is not None and module._join_config.enable and not module._divide_by_initial_world_size:
        raise ValueError(
            "join(divide_by_initial_world_size=False): PyTorch does not tell hooks how many ranks have inputs left, "
            "so the average is over all ranks; use join(divide_by_initial_world_size=True)"
        )
