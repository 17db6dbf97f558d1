"""Birder (Peng et al., NeurIPS 2023): adaptive steps in one bit, without warm-up and without feedback.

    m_i <- beta m_i + (1 - beta) g_i ;  b_i <- beta b_i + (1 - beta) |g_i| ;  u_i = m_i / b_i, in [-1, 1]
    every rank sends a random sign with expectation u_i; the owner of an element averages them and answers with a
    random sign again;  x -= lr (answer + weight_decay x)

Signs are times the largest |u| of their block, in place of 1: the expectation is the same and the variance smaller.
Averages and random signs are unbiased, so there is nothing to feed back. m_i and b_i are each rank's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from commq.codecs.formats import Format, get_format
from commq.optim.exchange import MomentumExchange
from commq.optim.optimizer import CommOptimizer, Parameters, add_scaled_
from commq.optim.phase import Mode
from commq.optim.sign_sgd import check_sgd
from commq.recipe import Recipe

_TINY = 1e-30


class Birder(CommOptimizer):
    """Steps of one random bit.

    beta: of both means. momentum_format: sign; int2, whose zero keeps zeros; fp32 for the rule without compression; or
    a recipe, with schedule two_hop for the paper's hierarchy. seed: of the random signs, the same on all ranks.
    `.grad` holds the answer, numbers up to 1 whatever the gradients are: do not clip it. Rows without a gradient stay
    as they are where the block divides the row, see `sign_sgd.py`. See `CommOptimizer` for module, params, group and
    grad_scaler.
    """

    clips = False

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-3,
        beta: float = 0.95,
        weight_decay: float = 0.0,
        *,
        params: Parameters | None = None,
        momentum_format: Recipe | Format | str = "sign",
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_sgd(lr, beta, weight_decay)
        recipe = momentum_format
        if not isinstance(recipe, Recipe):
            fmt = get_format(recipe) if isinstance(recipe, str) else recipe
            rounding = "nearest" if fmt.kind == "raw" else "stochastic"
            recipe = Recipe(name=f"birder-{fmt.name}", format=fmt, rounding=rounding, seed=seed)  # type: ignore[arg-type]
        defaults = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
        super().__init__(module, params, defaults, recipe=recipe, plain_format="fp32", **options)

    def make_own(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        return {"exp_avg": zeros, "exp_avg_abs": zeros.clone()}

    def fill_group(
        self, exchange: MomentumExchange, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> None:
        scale, weight = exchange.loss_scale, 1.0 - group["beta"]
        if scale != 1.0:
            torch._foreach_div_(grads, scale)
        momenta = [exchange.own[p]["exp_avg"] for p in parameters]
        sizes = [exchange.own[p]["exp_avg_abs"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, weight)
        torch._foreach_abs_(grads)
        torch._foreach_lerp_(sizes, grads, weight)
        torch._foreach_copy_(grads, sizes)
        torch._foreach_add_(grads, _TINY)  # 0 / 0 is 0
        torch._foreach_reciprocal_(grads)
        torch._foreach_mul_(grads, momenta)
        if scale != 1.0:
            torch._foreach_mul_(grads, scale)

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        add_scaled_(parameters, grads, None, -group["lr"])
