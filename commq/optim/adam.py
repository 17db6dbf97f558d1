"""1-bit Adam (Tang et al., ICML 2021): exact Adam first, then the momentum travels by one bit and v stays as it is.

    warm-up   Adam on uncompressed averaged gradients
    then      m_i = beta1 m + (1 - beta1) g_i ;  m = mean of m_i, compressed with feedback on both hops
              x  -= lr m / (sqrt(v_hat) + eps)

v_hat is the warm-up's last v with its bias correction, so that steps do not jump where the phase changes (the paper
has no bias correction at all); there is none of m, which would be 1 by then. Unlike the paper's the scale is one for
each block of one parameter and not for all parameters together: a parameter's size needs no compensation.

Elements whose v is exactly zero at that point have never had a gradient (unused rows of an embedding; one below 1e-22
counts as none). Codes of one bit have no zero and would move them, so they do not travel, do not count in a block's
scale, and stay as they are (weight decay but for, which is not communicated). This needs no masks from the user.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from commq.codecs.formats import Format
from commq.feedback.rule import Feedback
from commq.optim.exchange import MomentumExchange
from commq.optim.optimizer import CommOptimizer, Parameters, add_scaled_, floats, momentum_recipe
from commq.optim.phase import Mode, is_stable
from commq.recipe import Recipe

MEMORY = 100
"""Steps that a variance should remember, 1 / (1 - beta2), to be frozen; 20 are known to diverge."""
GRADIENTS = 20
"""Gradients that it should have seen."""
_log = logging.getLogger("commq")


class OneBitAdam(CommOptimizer):
    """Adam that sends its momentum in one bit an element once its variance is frozen.

    module, params, group, grad_scaler: see `CommOptimizer`.
    lr, betas, eps, weight_decay, decoupled_weight_decay: those of torch.optim.Adam (eps is added outside of the square
    root; decoupled weight decay is AdamW's), whose fused version warm-up is to the bit for float32 parameters.
    freeze_step: steps of warm-up. None: until the 1-norm of v has changed by less than freeze_ratio over
    1 / (1 - beta2) steps (section 7.1), looked at that often.
    beta2: v remembers 1 / (1 - beta2) steps, and what it remembers last holds for the rest of training. An element
    that had hardly a gradient in these steps (a rare token's row) has a v near zero, and makes steps too large by
    up to 1 / sqrt(beta2**k) if it had none in the last k: 170 times for k = 200 and beta2 = 0.95, 1.1 times for the
    paper's 0.999. Adam itself corrects that with the next gradient; a frozen v cannot, so 0.95 diverges where Adam
    is fine. The 1-norm says nothing of it, being that of the large elements. Below 0.99, or with fewer than 20
    gradients before the freeze, there is a warning on the logger "commq".
    momentum_format, answer_format, feedback: see `momentum_recipe`. warmup_format: fp32, bf16 or fp16.

    After warm-up `.grad` holds the averaged momentum: torch.nn.utils.clip_grad_norm_ between backward and step clips by
    its norm, and what it leaves is the momentum of the next step. Buckets of bfloat16 carry momenta rounded to
    bfloat16; all state is float32. A GradScaler has to be passed here.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        params: Parameters | None = None,
        decoupled_weight_decay: bool = False,
        freeze_step: int | None = None,
        freeze_ratio: float = 0.96,
        momentum_format: Recipe | Format | str = "sign",
        answer_format: Format | str | None = None,
        feedback: Feedback | str = "classic",
        warmup_format: Format | str = "fp32",
        **options: Any,
    ) -> None:
        if freeze_step is not None and freeze_step < 1:
            raise ValueError(f"freeze_step={freeze_step}: expected at least 1; without warm-up there is no variance")
        if not 0.0 < freeze_ratio <= 1.0:
            raise ValueError(f"freeze_ratio={freeze_ratio}: expected 0 < freeze_ratio <= 1")
        check_adam(lr, betas, eps, weight_decay)
        self.freeze_step, self.freeze_ratio = freeze_step, freeze_ratio
        self.frozen = False
        """The variance is frozen: the momentum travels."""
        self._norm = 0.0  # of v, when it was last looked at
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        recipe = momentum_recipe(momentum_format, answer=answer_format, feedback=feedback)
        super().__init__(module, params, defaults, recipe=recipe, plain_format=warmup_format, **options)
        self._dead: dict[int, Tensor] = {}
        if not self._exchanges or self.exchange.transport.rank == 0:
            self._warn_of_short_memory()

    def mode(self, step: int) -> Mode:
        return "coded" if self.frozen else "plain"

    def timing(self) -> dict[str, Any]:
        return {"freeze_step": self.freeze_step, "freeze_ratio": self.freeze_ratio}

    def warm_up_gradients(self) -> int | None:
        """Gradients that the variance has seen when it is frozen; None: as many as it takes."""
        return self.freeze_step

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        step = torch.zeros((), device=parameter.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        self.fill_momentum(exchange.loss_scale, group, parameters, grads)
        self.silence(parameters, grads)

    def fill_momentum(self, scale: float, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        """grads <- scale * (beta1 m + (1 - beta1) g)."""
        beta1, decay = group["betas"][0], group["weight_decay"]
        if decay and not group["decoupled_weight_decay"]:
            torch._foreach_add_(grads, floats(parameters), alpha=decay * scale)
        momenta = self.state_of(parameters, "exp_avg")
        if scale != 1.0:
            momenta = list(torch._foreach_mul(momenta, scale))
        torch._foreach_lerp_(grads, momenta, beta1)

    def silence(self, parameters: list[Tensor], tensors: list[Tensor], value: float = 0.0) -> None:
        """Write `value` where nothing travels."""
        for p, tensor in zip(parameters, tensors, strict=True) if self._dead else ():
            if id(p) in self._dead:
                in_memory(tensor).index_fill_(0, self._dead[id(p)], value)

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if mode == "plain":
            self._update_exactly(group, parameters, grads)
        else:
            torch._foreach_copy_(self.state_of(parameters, "exp_avg"), grads)
            self.move(group, parameters, grads, group["lr"])

    def move(self, group: dict[str, Any], parameters: list[Tensor], momenta: list[Tensor], lr: float) -> None:
        """x <- x (1 - lr weight_decay) - lr m / (sqrt(v_hat) + eps)."""
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        add_scaled_(parameters, momenta, self.state_of(parameters, "precondition"), -lr)

    def finish(self, mode: Mode) -> None:
        if not self.frozen and self._is_time():
            self.freeze()

    def freeze(self) -> None:
        """End warm-up: v becomes what momenta are multiplied by. Waits for the device, this once."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                v, steps = state.pop("exp_avg_sq"), state.pop("step")
                correction = (1.0 - group["betas"][1] ** steps.to(torch.float64)).to(torch.float32)
                state["precondition"] = invert_root(v.div_(correction), group["eps"])
        self.frozen = True
        self.exchange_live("precondition")

    def exchange_live(self, key: str) -> None:
        """From now on, encode only elements for which the state `key` is not zero, the same on all ranks."""
        live = self.find_live(key)
        for exchange in self._exchanges:
            exchange.restart(live)

    def find_live(self, key: str) -> dict[str, Tensor]:
        """By name, for parameters where some are not, the elements whose state `key` is not zero. Marks the others."""
        tensors = self.state_of([p for _, p in self._named], key)
        if not tensors:
            return {}
        any_dead = torch.stack([(tensor == 0).any() for tensor in tensors]).tolist()
        self._dead, live = {}, {}
        for (name, p), tensor, has_dead in zip(self._named, tensors, any_dead, strict=True):
            if has_dead:
                zero = in_memory(tensor) == 0
                self._dead[id(p)] = zero.nonzero().flatten()
                live[name] = (~zero).nonzero().flatten()
        return live

    def _update_exactly(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        work = floats(parameters)
        beta1, beta2 = group["betas"]
        adam(
            work,
            grads,
            self.state_of(parameters, "exp_avg"),
            self.state_of(parameters, "exp_avg_sq"),
            [],
            self.state_of(parameters, "step"),
            fused=True,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if work is not parameters:
            torch._foreach_copy_(parameters, work)

    def _is_time(self) -> bool:
        done = self.exchange.step
        if self.freeze_step is not None:
            return done >= self.freeze_step
        beta2 = max(group["betas"][1] for group in self.param_groups)
        if done % max(1, round(1.0 / (1.0 - beta2))):
            return False
        variances = [state["exp_avg_sq"] for state in self.state.values()]
        norm = float(torch.stack(torch._foreach_norm(variances, 1)).sum())
        if len(self._exchanges) == 1:  # else all ranks are here
            norm = max(self.exchange.transport.share(norm))  # devices may add in another order
        before, self._norm = self._norm, norm / (1.0 - beta2**done)
        return is_stable(self._norm, before, self.freeze_ratio)

    def _warn_of_short_memory(self) -> None:
        beta2 = min(group["betas"][1] for group in self.param_groups)
        seen = self.warm_up_gradients()
        if 1.0 - beta2 > 1.0 / MEMORY + 1e-9 or (seen is not None and seen < GRADIENTS):
            _log.warning(
                "commq: %s will freeze a variance that averages about %d steps (beta2=%g, gradients of warm-up: %s). "
                "Elements whose gradients are small or absent in so few make steps that are far too large from then "
                "on, and training may diverge; expected beta2 of %g or more, such as 0.999, and %d gradients or more",
                type(self).__name__,
                min(round(1.0 / (1.0 - beta2)), seen or MEMORY),
                beta2,
                "any" if seen is None else seen,
                1.0 - 1.0 / MEMORY,
                GRADIENTS,
            )

    def _phase_state(self) -> dict[str, Any]:
        return {"frozen": self.frozen, "norm": self._norm}

    def _load_phase(self, state: dict[str, Any]) -> None:
        self.frozen, self._norm = state["frozen"], state["norm"]
        self._dead = {}
        if self.frozen:
            self.exchange_live("precondition")
        else:
            for exchange in self._exchanges:
                exchange.restart({})


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """ValueError for what Adam cannot work with."""
    if not (lr >= 0.0 and eps > 0.0 and weight_decay >= 0.0 and all(0.0 <= beta < 1.0 for beta in betas)):
        raise ValueError(
            f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: expected lr >= 0, betas in [0, 1), "
            "eps > 0 and weight_decay >= 0"
        )


def invert_root(v: Tensor, eps: float) -> Tensor:
    """1 / (sqrt(v) + eps), but 0 where v is exactly 0. Overwrites v."""
    zero = v == 0
    return v.sqrt_().add_(eps).reciprocal_().masked_fill_(zero, 0.0)


def in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as a vector, in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
