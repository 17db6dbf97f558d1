"""What the optimizers have in common: the exchange they are paired with, their state, and who calls whom.

    backward      the hook asks `mode`; `fill` turns a bucket's gradients into what travels; `.grad` becomes the average
    step          `update` reads `.grad`, which is the same on all ranks (but in local steps), and changes parameters

Parameters are lists of tensors in one call (torch._foreach_*), state is float32 whatever the parameters are, and
neither backward nor step waits for the device, but where a phase ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from commq.attach.ddp import comm_hook
from commq.codecs.formats import Format, get_format
from commq.codecs.rotation import Rotation
from commq.collectives.group import Group, transport_of
from commq.collectives.transport import C10d, Transport, check_equal
from commq.feedback.rule import Feedback
from commq.optim.exchange import FlatBucket, MomentumExchange
from commq.optim.phase import Mode
from commq.recipe import Recipe

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def momentum_recipe(
    format: Recipe | Format | str, *, answer: Format | str | None = None, feedback: Feedback | str = "classic"
) -> Recipe:
    """The recipe that a momentum travels by: `format` on both hops, with feedback on both.

    format: a format or its name, such as sign, int4, or fp32 for no compression; or a whole recipe, which is returned
    as it is. answer: the second hop's, if it is another. feedback: a rule of the first hop, or its name; with "none"
    there is none on either hop, otherwise the second hop's is classic. Raw formats have none.
    """
    if isinstance(format, Recipe):
        return format
    first = get_format(format) if isinstance(format, str) else format
    second = get_format(answer) if isinstance(answer, str) else answer
    if first.kind == "raw":
        return Recipe(name=f"momentum-{first.name}", format=first, answer=second)
    rule = Feedback(rule=feedback) if isinstance(feedback, str) else feedback  # type: ignore[arg-type]
    answered = rule.rule != "none" and (second or first).kind != "raw"
    rotates = any(fmt is not None and fmt.fit != "largest" for fmt in (first, second))
    return Recipe(
        name=f"momentum-{first.name}",
        format=first,
        answer=second,
        rotation=Rotation(size=1024, signs=True) if rotates else None,
        feedback=rule,
        answer_feedback=Feedback(rule="classic" if answered else "none"),
    )


class CommOptimizer(Optimizer):
    """Base of the optimizers that decide what is sent.

    module: a DistributedDataParallel module, which gets the communication hook; or any module with `group`, a process
    group or a DeviceMesh of one dimension, over which step() exchanges (parameters that are DTensors, their own
    shard). With neither, `make_exchange` makes what the caller hands buckets of gradients to.
    params: parameters or groups of them, as for every optimizer; all of the module's that need a gradient by default.
    grad_scaler: the scaler in use. Momenta are kept unscaled, and a step that it skips changes nothing.
    Raises TypeError or ValueError, the same on every rank, for what cannot be; RuntimeError in backward or step for a
    backward pass too many or too few.
    """

    clips = True
    """`.grad` is a gradient or a momentum, which may be clipped by its norm between backward and step."""

    def __init__(
        self,
        module: nn.Module,
        params: Parameters | None,
        defaults: dict[str, Any],
        *,
        recipe: Recipe,
        plain_format: Format | str,
        group: Group | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        backend: str = "auto",
    ) -> None:
        self.recipe = recipe
        plain = get_format(plain_format) if isinstance(plain_format, str) else plain_format
        if plain.kind != "raw":
            raise ValueError(f"warmup_format={plain}: expected fp32, bf16 or fp16; warm-up sends plain gradients")
        self.plain_recipe = Recipe(name=f"plain-{plain.name}", format=plain)
        ddp = module if isinstance(module, DistributedDataParallel) else None
        if ddp is not None and group is not None:
            raise TypeError(
                f"{type(self).__name__}: got a DistributedDataParallel module and group={group}; DDP has a group "
                "of its own: drop one of them"
            )
        if group is not None and grad_scaler is not None:
            raise ValueError(
                "grad_scaler with group=: the scaler looks for infinities before step() exchanges, so ranks would skip "
                "different steps; use DistributedDataParallel, or bfloat16 without a scaler"
            )
        inner: nn.Module = module if ddp is None else ddp.module
        trained = [(name, p) for name, p in inner.named_parameters() if p.requires_grad]
        super().__init__([p for _, p in trained] if params is None else params, defaults)
        given = {id(p) for group in self.param_groups for p in group["params"]}
        if given != {id(p) for _, p in trained}:
            missing = [name for name, p in trained if id(p) not in given]
            raise ValueError(
                f"{type(self).__name__}: expected exactly the module's parameters that need a gradient, "
                f"{f'missing are {missing[:3]}' if missing else 'some are of another module'}; "
                "set requires_grad=False on those that stay as they are"
            )
        self._named = [(name, local(p)) for name, p in trained]
        self._grad_scaler, self._backend = grad_scaler, backend
        self._exchanges: list[MomentumExchange] = []
        self._flat = FlatBucket([p for _, p in self._named]) if group is not None else None
        if group is not None:
            self.make_exchange(transport_of(group))
        elif ddp is not None:
            exchange = self.make_exchange(C10d(ddp.process_group), module=ddp)
            ddp.register_comm_hook(exchange, comm_hook)

    @property
    def exchange(self) -> MomentumExchange:
        """This rank's exchange: `stats()`, and the state that other ranks do not have."""
        if not self._exchanges:
            raise RuntimeError(
                f"{type(self).__name__} has nothing to exchange with; give it a DistributedDataParallel module or "
                "group=, or call make_exchange"
            )
        return self._exchanges[0]

    def make_exchange(self, transport: Transport, *, module: DistributedDataParallel | None = None) -> MomentumExchange:
        """The exchange of a rank whose buckets the caller hands to it. All ranks make theirs together.

        Ranks of one process may share an optimizer, and so its parameters and state: each has an exchange. When all
        have exchanged, `.grad` is set to the average that any of them got, and one step() follows for all.
        ValueError, the same on every rank, if their optimizers are not the same.
        """
        check_equal("the optimizer", f"{type(self).__name__} {self.defaults} {self.timing()}", transport)
        exchange = MomentumExchange(
            self, self._named, transport, module=module, grad_scaler=self._grad_scaler, backend=self._backend
        )
        self._exchanges.append(exchange)
        return exchange

    # What an optimizer says

    def mode(self, step: int) -> Mode:
        """What is sent in step number `step`: without phases, always codes."""
        return "coded"

    def timing(self) -> dict[str, Any]:
        """The arguments that `mode` depends on: ranks that differ there would wait for each other for ever."""
        return {}

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state at its beginning."""
        return {}

    def make_own(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state that every rank has for itself, at its beginning."""
        return {}

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        """Turn gradients (of one group, multiplied by exchange.loss_scale) into what travels, in place. float32."""
        raise NotImplementedError

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        """Change parameters by what has arrived, float32: averages (but in local steps), no longer scaled."""
        raise NotImplementedError

    def finish(self, mode: Mode) -> None:
        """The step is done: time to end a phase."""

    # What everybody else calls

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if isinstance(group.get("lr"), Tensor):
            raise TypeError("lr is a tensor, expected a number: it is read on the host in every step")
        for p in group["params"]:
            if p.requires_grad:
                self.state[p] = self.make_state(local(p))
        self._group_of = {id(local(p)): g for g in self.param_groups for p in g["params"]}
        self._key_of = {id(local(p)): p for g in self.param_groups for p in g["params"]}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for exchange in self._exchanges:
            exchange.discard()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def fill(self, exchange: MomentumExchange, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        for group in self.param_groups:
            pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if self._group_of[id(p)] is group]
            if not pairs:
                continue
            own, views = [p for p, _ in pairs], [g for _, g in pairs]
            work = floats(views)
            self.fill_group(exchange, group, own, work)
            if work is not views:
                torch._foreach_copy_(views, work)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Finish the step whose backward pass is over. `closure` does the backward pass itself."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._flat is not None:
            self._exchange_now(self._flat)
        mode = self.exchange.mode
        for exchange in self._exchanges:
            exchange.take()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                grads = [local(p.grad) for p in parameters]
                self.update(mode, group, [local(p) for p in parameters], floats(grads))
        self.finish(mode)
        return loss

    def state_of(self, parameters: Iterable[Tensor], key: str) -> list[Tensor]:
        """The same state of several parameters."""
        return [self.state[self._key_of[id(p)]][key] for p in parameters]

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, and "phase": where it is, the same on all ranks; "exchange": this rank's own."""
        return super().state_dict() | {"phase": self._phase_state(), "exchange": self.exchange.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit. All ranks call it together; each with its own "exchange"."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(saved, ours, strict=True):  # torch's casts to the parameter's dtype
            state = state_dict["state"].get(number, {})
            self.state[p] = {key: value.detach().to(p.device, copy=True) for key, value in state.items()}
        self._group_of = {id(local(p)): g for g in self.param_groups for p in g["params"]}
        self._load_phase(state_dict["phase"])
        self.exchange.load_state_dict(state_dict["exchange"])

    def _phase_state(self) -> dict[str, Any]:
        return {}

    def _load_phase(self, state: dict[str, Any]) -> None:
        pass

    def _exchange_now(self, flat: FlatBucket) -> None:
        """Exchange in place of a hook: gradients of this rank become averages in `.grad`."""
        grads = [self._key_of[id(p)].grad for p in flat.parameters()]
        present = [(view, local(grad)) for view, grad in zip(flat.views, grads, strict=True) if grad is not None]
        flat.buffer().zero_()
        torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
        self.exchange.exchange(flat)  # type: ignore[arg-type]
        torch._foreach_copy_([grad for _, grad in present], [view for view, _ in present])


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def floats(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in float32: the list itself if they are."""
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        return tensors
    return [tensor.float() for tensor in tensors]


def add_scaled_(parameters: list[Tensor], directions: list[Tensor], factors: list[Tensor] | None, scale: float) -> None:
    """parameters += scale * directions (* factors), computed in float32 and rounded once."""
    work = floats(parameters)
    if factors is None:
        torch._foreach_add_(work, directions, alpha=scale)
    else:
        torch._foreach_addcmul_(work, directions, factors, value=scale)
    if work is not parameters:
        torch._foreach_copy_(parameters, work)
