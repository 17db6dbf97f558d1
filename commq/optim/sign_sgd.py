"""SGD by signs: EF-SignSGD, SignSGD with majority vote, and 1-bit SGD.

None of them has a variance to tell which elements never have a gradient. A block of zeros is sent as zeros, so unused
rows of an embedding stay as they are where the block of the format divides the row; elsewhere they share blocks, and
move, with rows that are used (`commq.get_format("sign", block=...)` chooses the block).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from commq.codecs.formats import Format
from commq.feedback.rule import Feedback
from commq.optim.exchange import MomentumExchange
from commq.optim.optimizer import CommOptimizer, Parameters, add_scaled_, floats, momentum_recipe
from commq.optim.phase import Mode
from commq.recipe import Recipe


class EFSignSGD(CommOptimizer):
    """SGD whose steps travel as signs, with what they lost added to the next (Karimireddy et al., ICML 2019).

        p_i = lr (g_i + weight_decay x) + e_i ;  sent_i = mean |p_i| of the block times sign(p_i) ;  e_i <- p_i - sent_i
        m <- momentum m + mean of sent_i ;  x -= m

    The learning rate is inside of what is fed back, so changing it is harmless. The mean travels by signs, too, with
    feedback of its own (Zheng et al. 2019). `.grad` holds the averaged step. See `CommOptimizer` for module, params,
    group and grad_scaler, and `momentum_recipe` for momentum_format, answer_format and feedback.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        params: Parameters | None = None,
        momentum_format: Recipe | Format | str = "sign",
        answer_format: Format | str | None = None,
        feedback: Feedback | str = "classic",
        **options: Any,
    ) -> None:
        check_sgd(lr, momentum, weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        recipe = momentum_recipe(momentum_format, answer=answer_format, feedback=feedback)
        super().__init__(module, params, defaults, recipe=recipe, plain_format="fp32", **options)

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=torch.float32)}

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        if group["weight_decay"]:
            torch._foreach_add_(grads, floats(parameters), alpha=group["weight_decay"] * exchange.loss_scale)
        torch._foreach_mul_(grads, group["lr"])

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        add_scaled_(parameters, gather_momentum(self, group, parameters, grads), None, -1.0)


class SignSGD(CommOptimizer):
    """Signs of momenta, and the majority of the ranks decides (Bernstein et al., ICML 2018 and ICLR 2019).

        m_i <- momentum m_i + (1 - momentum) g_i ;  x -= lr (sign of the sum of sign(m_i) + weight_decay x)

    The momenta are each rank's own. With an even number of ranks a tie counts as +1. `.grad` holds the vote's outcome,
    +1, -1 or their mean; in a block in which a rank has exact zeros, its votes weigh as much as its share of others.
    See `CommOptimizer` for module, params, group and grad_scaler.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        params: Parameters | None = None,
        momentum_format: Recipe | Format | str = "sign",
        **options: Any,
    ) -> None:
        check_sgd(lr, momentum, weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        recipe = momentum_recipe(momentum_format, feedback="none")
        super().__init__(module, params, defaults, recipe=recipe, plain_format="fp32", **options)

    def make_own(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(parameter, dtype=torch.float32)}

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        if exchange.loss_scale != 1.0:
            torch._foreach_div_(grads, exchange.loss_scale)
        momenta = [exchange.own[p]["exp_avg"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1.0 - group["momentum"])
        torch._foreach_copy_(grads, signs_of(momenta))

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        add_scaled_(parameters, signs_of(grads), None, -group["lr"])


class OneBitSGD(CommOptimizer):
    """SGD or AdaGrad on gradients of one bit, with feedback on both hops (Seide et al., Interspeech 2014).

        g = mean of g_i, compressed ;  adagrad: s <- s + g**2 ;  g <- g / (sqrt(s) + eps)
        m <- momentum m + g + weight_decay x ;  x -= lr m

    The first warmup_steps steps are uncompressed (the paper's cold start). Where the paper has two values for each
    column, one for each sign, a block has one, mean |g|. `.grad` holds the averaged gradient, so clipping is as
    ever. See `CommOptimizer` for module, params, group and grad_scaler, and `momentum_recipe` for
    momentum_format, answer_format and feedback.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        params: Parameters | None = None,
        adagrad: bool = False,
        eps: float = 1e-10,
        warmup_steps: int = 0,
        momentum_format: Recipe | Format | str = "sign",
        answer_format: Format | str | None = None,
        feedback: Feedback | str = "classic",
        warmup_format: Format | str = "fp32",
        **options: Any,
    ) -> None:
        check_sgd(lr, momentum, weight_decay)
        if warmup_steps < 0 or eps <= 0.0:
            raise ValueError(f"warmup_steps={warmup_steps}, eps={eps}: expected warmup_steps >= 0 and eps > 0")
        self.warmup_steps, self.adagrad, self.eps = warmup_steps, adagrad, eps
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        recipe = momentum_recipe(momentum_format, answer=answer_format, feedback=feedback)
        super().__init__(module, params, defaults, recipe=recipe, plain_format=warmup_format, **options)

    def mode(self, step: int) -> Mode:
        return "plain" if step < self.warmup_steps else "coded"

    def timing(self) -> dict[str, Any]:
        return {"warmup_steps": self.warmup_steps}

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        return {"momentum_buffer": zeros} | ({"sum": zeros.clone()} if self.adagrad else {})

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        """The gradients themselves travel."""

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if self.adagrad:
            sums = self.state_of(parameters, "sum")
            torch._foreach_addcmul_(sums, grads, grads)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, self.eps)
            grads = list(torch._foreach_div(grads, roots))
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, floats(parameters), alpha=group["weight_decay"]))
        add_scaled_(parameters, gather_momentum(self, group, parameters, grads), None, -group["lr"])


def signs_of(tensors: list[Tensor]) -> list[Tensor]:
    """-1, 0 or +1, and NaN for what is not finite (torch.sign makes a NaN 0)."""
    signs = list(torch._foreach_sign(tensors))
    torch._foreach_add_(signs, tensors, alpha=0.0)
    return signs


def gather_momentum(
    optimizer: CommOptimizer, group: dict[str, Any], parameters: list[Tensor], steps: list[Tensor]
) -> list[Tensor]:
    """m <- momentum m + steps, and m; the steps themselves without momentum."""
    if not group["momentum"]:
        return steps
    momenta = optimizer.state_of(parameters, "momentum_buffer")
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, steps)
    return momenta


def check_sgd(lr: float, momentum: float, weight_decay: float) -> None:
    """ValueError for what SGD cannot work with."""
    if not (lr >= 0.0 and 0.0 <= momentum < 1.0 and weight_decay >= 0.0):
        raise ValueError(
            f"lr={lr}, momentum={momentum}, weight_decay={weight_decay}: expected lr >= 0, momentum in [0, 1) and "
            "weight_decay >= 0"
        )
