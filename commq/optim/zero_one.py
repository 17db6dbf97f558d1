"""0/1 Adam (Lu et al., ICLR 2023): variance refreshed ever more rarely, one bit from the first step on, local steps.

    until var_freeze_step   at refreshes (phase.VarianceRefreshes) gradients travel uncompressed: m and v are Adam's;
                            at the other steps the momentum travels compressed, as in 1-bit Adam
    afterwards              every rank makes steps of its own and adds them up:
                                m_i = beta1 m_i + (1 - beta1) g_i ;  x_i -= lr m_i / (sqrt(v) + eps) ;  u_i += lr m_i
                            and ranks meet (phase.LocalSteps) by exchanging u compressed, with feedback on both hops:
                                x = x_last - u / (sqrt(v) + eps) ;  m = u / (sum of lr) ;  u_i = 0

x_last is kept, so replicas are the same to the bit whenever they meet. Two things differ from the paper: v is corrected
for its start at zero by the number of its refreshes (bias_correction=False: not), and local steps begin only when v is
frozen (as in DeepSpeed). Residuals start anew there, because u has another unit than m.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from commq.codecs.formats import Format
from commq.feedback.rule import Feedback
from commq.optim.adam import OneBitAdam, invert_root
from commq.optim.exchange import MomentumExchange
from commq.optim.optimizer import Parameters, add_scaled_, floats, local
from commq.optim.phase import LocalSteps, Mode, VarianceRefreshes
from commq.recipe import Recipe


class ZeroOneAdam(OneBitAdam):
    """Adam that sends one bit an element, and after `var_freeze_step` steps in most steps nothing.

    module, params, group: see `CommOptimizer`. lr, betas, eps, weight_decay, decoupled_weight_decay,
    momentum_format, answer_format, feedback, warmup_format (of gradients at refreshes): see `OneBitAdam`.
    var_freeze_step: steps until the variance is frozen for good; at least as many as the learning rate rises.
    var_update_scaler: refreshes until their interval doubles. local_step_scaler: steps until the interval between
    meetings doubles, from 1 up to local_step_clipper.

    In local steps `.grad` is the rank's own gradient, and clipping by its norm clips that; where ranks meet it holds u.
    Replicas differ between meetings (`synchronized` says whether they do), so each rank saves its own parameters and
    state then. The element masks of OneBitAdam hold from var_freeze_step on; before, elements with v = 0 do not
    move either, but count in their block's scale. No GradScaler: ranks would skip different local steps.
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
        bias_correction: bool = True,
        var_freeze_step: int,
        var_update_scaler: int = 16,
        local_step_scaler: int = 1000,
        local_step_clipper: int = 16,
        momentum_format: Recipe | Format | str = "sign",
        answer_format: Format | str | None = None,
        feedback: Feedback | str = "classic",
        warmup_format: Format | str = "fp32",
        **options: Any,
    ) -> None:
        if options.get("grad_scaler") is not None:
            raise ValueError(
                "ZeroOneAdam with grad_scaler: an infinity in a local step would be one rank's alone, and the ranks' "
                "scales would drift apart; train in bfloat16, or use OneBitAdam"
            )
        if min(var_update_scaler, local_step_scaler, local_step_clipper) < 1:
            raise ValueError(
                f"var_update_scaler={var_update_scaler}, local_step_scaler={local_step_scaler}, "
                f"local_step_clipper={local_step_clipper}: expected at least 1"
            )
        self.bias_correction = bias_correction
        self.refreshes = VarianceRefreshes(doubling=var_update_scaler, end=var_freeze_step)
        self.meetings = LocalSteps(begin=var_freeze_step, doubling=local_step_scaler, longest=local_step_clipper)
        super().__init__(
            module,
            lr,
            betas,
            eps,
            weight_decay,
            params=params,
            decoupled_weight_decay=decoupled_weight_decay,
            freeze_step=var_freeze_step,
            momentum_format=momentum_format,
            answer_format=answer_format,
            feedback=feedback,
            warmup_format=warmup_format,
            **options,
        )

    @property
    def synchronized(self) -> bool:
        """All ranks hold the same parameters, and the same state but for residuals."""
        return self.exchange.mode != "local"

    def mode(self, step: int) -> Mode:
        if not self.frozen:
            return "plain" if self.refreshes.at(step) else "coded"
        return "coded" if self.meetings.at(step) else "local"

    def timing(self) -> dict[str, Any]:
        return {"refreshes": self.refreshes, "meetings": self.meetings}

    def warm_up_gradients(self) -> int:
        return self.refreshes.count(self.refreshes.end - 1)

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "precondition": zeros.clone()}

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        self.fill_momentum(1.0, group, parameters, grads)
        if self.frozen:
            torch._foreach_mul_(grads, group["lr"])
            torch._foreach_add_(grads, self.state_of(parameters, "local_sum"))
        self.silence(parameters, grads)

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if mode == "plain":
            self._refresh(group, parameters, grads)
        elif not self.frozen:
            super().update(mode, group, parameters, grads)
        else:
            lr = group["lr"]
            group["lr_sum"] += lr
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                group["decay"] *= 1.0 - lr * group["weight_decay"]
            if mode == "local":
                self._step_alone(group, parameters, grads)
            else:
                self._meet(group, parameters, grads)

    def freeze(self) -> None:
        for group in self.param_groups:
            group["lr_sum"], group["decay"] = 0.0, 1.0
            for p in group["params"]:
                state = self.state[p]
                state["local_sum"] = state.pop("exp_avg_sq").zero_()
                state["last"] = local(p).detach().to(torch.float32, copy=True)
        self.frozen = True
        self.exchange_live("precondition")

    def _refresh(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            grads = list(torch._foreach_add(grads, floats(parameters), alpha=group["weight_decay"]))
        momenta, variances, factors = (
            self.state_of(parameters, key) for key in ("exp_avg", "exp_avg_sq", "precondition")
        )
        torch._foreach_lerp_(momenta, grads, 1.0 - beta1)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, grads, grads, value=1.0 - beta2)
        count = self.refreshes.count(self.exchange.step - 1)
        correction = 1.0 - beta2**count if self.bias_correction else 1.0
        for factor, variance in zip(factors, variances, strict=True):
            factor.copy_(invert_root(variance / correction, group["eps"]))
        self.move(group, parameters, momenta, group["lr"])

    def _step_alone(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            grads = list(torch._foreach_add(grads, floats(parameters), alpha=group["weight_decay"]))
        momenta = self.state_of(parameters, "exp_avg")
        torch._foreach_lerp_(momenta, grads, 1.0 - group["betas"][0])
        torch._foreach_add_(self.state_of(parameters, "local_sum"), momenta, alpha=group["lr"])
        self.move(group, parameters, momenta, group["lr"])

    def _meet(self, group: dict[str, Any], parameters: list[Tensor], sums: list[Tensor]) -> None:
        """sums: the average of u over the ranks."""
        last = self.state_of(parameters, "last")
        if group["decay"] != 1.0:
            torch._foreach_mul_(last, group["decay"])
        add_scaled_(last, sums, self.state_of(parameters, "precondition"), -1.0)
        torch._foreach_copy_(parameters, last)
        if group["lr_sum"]:  # else nobody has moved
            momenta = self.state_of(parameters, "exp_avg")
            torch._foreach_copy_(momenta, sums)
            torch._foreach_div_(momenta, group["lr_sum"])
        torch._foreach_zero_(self.state_of(parameters, "local_sum"))
        group["lr_sum"], group["decay"] = 0.0, 1.0
