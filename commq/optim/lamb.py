"""1-bit LAMB (Li et al., HiPC 2022): LAMB first, then its momentum travels by one bit and its trust ratios are scaled.

    warm-up   m, v as Adam's without bias correction ;  d = m / (sqrt(v) + eps) + weight_decay x
              c = clamp(||x|| / ||d||, min_coeff, max_coeff) of each parameter ;  x -= lr c d
              c_mean <- coeff_beta c_mean + (1 - coeff_beta) c
    then      m = mean of beta1 m + (1 - beta1) g_i, compressed ;  d with the frozen v
              g' = (m - beta1 m_before) / (1 - beta1), the gradient in m ;  v' <- beta2 v' + (1 - beta2) g'^2
              f = max of (sqrt(v) + eps) / (sqrt(v') + eps), weighed with 1 by the share of weight decay in d
              f <- clamp(f, factor_min, factor_max), and within factor_threshold of the last step's f
              x -= lr c_mean f d

The paper scales the momenta of all parameters to one size before one scale codes them all. Here every block of every
parameter has a scale of its own, which makes that unnecessary: signs times a mean are linear in the size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commq.codecs.formats import Format
from commq.feedback.rule import Feedback
from commq.optim.adam import OneBitAdam, invert_root
from commq.optim.optimizer import Parameters, add_scaled_, floats
from commq.optim.phase import Mode
from commq.recipe import Recipe


class OneBitLamb(OneBitAdam):
    """LAMB that sends its momentum in one bit an element once its variance is frozen.

    module, params, group, grad_scaler: see `CommOptimizer`. freeze_step, freeze_ratio, momentum_format,
    answer_format, feedback, warmup_format, and what `.grad` holds: see `OneBitAdam`.
    weight_decay: added to the direction, before its trust ratio. max_coeff, min_coeff, coeff_beta, factor_max,
    factor_min, factor_threshold: as above, with DeepSpeed's defaults. c_mean is corrected for its start at zero.
    A parameter that is zero, or whose direction is, has trust ratio 1.
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
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        freeze_step: int | None = None,
        freeze_ratio: float = 0.96,
        momentum_format: Recipe | Format | str = "sign",
        answer_format: Format | str | None = None,
        feedback: Feedback | str = "classic",
        warmup_format: Format | str = "fp32",
        **options: Any,
    ) -> None:
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise ValueError(
                "OneBitLamb: parameters are DTensors, and trust ratios need the norms of whole parameters; "
                "use OneBitAdam, or parameters that are not sharded"
            )
        if not (0.0 < min_coeff <= max_coeff and 0.0 < factor_min <= 1.0 <= factor_max and 0.0 <= coeff_beta < 1.0):
            raise ValueError(
                f"coeff {min_coeff} to {max_coeff}, factor {factor_min} to {factor_max}, coeff_beta={coeff_beta}: "
                "expected 0 < min <= max, factors on both sides of 1, and coeff_beta in [0, 1)"
            )
        self.coeff_range, self.coeff_beta = (min_coeff, max_coeff), coeff_beta
        self.factor_range, self.factor_threshold = (factor_min, factor_max), factor_threshold
        super().__init__(
            module,
            lr,
            betas,
            eps,
            weight_decay,
            params=params,
            decoupled_weight_decay=True,  # none in what travels
            freeze_step=freeze_step,
            freeze_ratio=freeze_ratio,
            momentum_format=momentum_format,
            answer_format=answer_format,
            feedback=feedback,
            warmup_format=warmup_format,
            **options,
        )

    def make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        zero = torch.zeros((), device=parameter.device)
        return {"step": zero, "exp_avg": zeros, "exp_avg_sq": zeros.clone(), "coeff": zero.clone()}

    def update(self, mode: Mode, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        momenta, variances = self.state_of(parameters, "exp_avg"), self.state_of(parameters, "exp_avg_sq")
        if mode == "plain":
            torch._foreach_add_(self.state_of(parameters, "step"), 1.0)
            torch._foreach_lerp_(momenta, grads, 1.0 - beta1)
        else:
            # exp_avg_sq goes on as v', with the gradient that the momenta before and after speak of.
            torch._foreach_mul_(momenta, -beta1)
            torch._foreach_add_(momenta, grads)
            torch._foreach_div_(momenta, 1.0 - beta1)
        spoken_of = grads if mode == "plain" else momenta
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, spoken_of, spoken_of, value=1.0 - beta2)
        if mode == "plain":
            roots = torch._foreach_sqrt(variances)
            torch._foreach_add_(roots, group["eps"])
            directions = torch._foreach_div(momenta, roots)
        else:
            torch._foreach_copy_(momenta, grads)
            directions = torch._foreach_mul(momenta, self.state_of(parameters, "precondition"))
        adam_norms = torch._foreach_norm(directions) if mode != "plain" else ()
        if group["weight_decay"]:
            torch._foreach_add_(directions, floats(parameters), alpha=group["weight_decay"])
        norms = torch.stack(torch._foreach_norm(directions))
        if mode == "plain":
            coeffs = self._trust(parameters, norms)
        else:
            share = (torch.stack(adam_norms) / norms).nan_to_num(1.0).clamp(max=1.0)
            coeffs = self._scaled_trust(group, parameters, variances, share)
        torch._foreach_mul_(directions, list(coeffs.unbind()))
        add_scaled_(parameters, list(directions), None, -group["lr"])

    def freeze(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                steps = state.pop("step").to(torch.float64)
                state["coeff"].div_((1.0 - self.coeff_beta**steps).to(torch.float32))
                state["precondition"] = invert_root(state["exp_avg_sq"].clone(), group["eps"])
                state["factor"] = torch.ones_like(state["coeff"])
        self.frozen = True
        self.exchange_live("precondition")

    def _trust(self, parameters: list[Tensor], direction_norms: Tensor) -> Tensor:
        """c of each parameter; remembers its mean."""
        norms = torch.stack(torch._foreach_norm(floats(parameters)))
        ratios = (norms / direction_norms).clamp(*self.coeff_range)
        coeffs = torch.where((norms > 0) & (direction_norms > 0), ratios, torch.ones_like(norms))
        means = self.state_of(parameters, "coeff")
        torch._foreach_lerp_(means, list(coeffs.unbind()), 1.0 - self.coeff_beta)
        return coeffs

    def _scaled_trust(
        self, group: dict[str, Any], parameters: list[Tensor], variances: list[Tensor], share: Tensor
    ) -> Tensor:
        """c_mean f of each parameter. share: of the norm without weight decay in that of the direction."""
        ratios = torch._foreach_sqrt(variances)
        torch._foreach_add_(ratios, group["eps"])
        torch._foreach_mul_(ratios, self.state_of(parameters, "precondition"))
        torch._foreach_reciprocal_(ratios)
        self.silence(parameters, list(ratios))
        states = self.state_of(parameters, "factor")
        # A parameter without elements has no largest one.
        largest = torch._foreach_max([r if r.numel() else last for r, last in zip(ratios, states, strict=True)])
        factors = (torch.stack(largest) * share + (1.0 - share)).clamp(*self.factor_range)
        last = torch.stack(states)
        slack = self.factor_threshold
        factors = torch.minimum(torch.maximum(factors, last * (1.0 - slack)), last * (1.0 + slack))
        torch._foreach_copy_(states, list(factors.unbind()))
        return torch.stack(self.state_of(parameters, "coeff")) * factors
