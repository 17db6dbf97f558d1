"""Optimizers and the learning rate of a step."""

import math
from typing import Any

from torch import nn, optim
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from commq.optim import (
    AdamW4bit,
    AdamW8bit,
    AdamWFp8,
    Birder,
    EFSignSGD,
    OneBitAdam,
    OneBitLamb,
    SignSGD,
    ZeroOneAdam,
)
from commq.optim.optimizer import CommOptimizer
from commq.recipe import Recipe
from commq.train.config import OptimizerConfig

BETAS = (0.9, 0.95)
FROZEN_BETAS = (0.9, 0.999)
"""Of optimizers that freeze the variance: one averaged over 20 steps has entries near zero, which then stay there."""

_LOW_BIT = {"adamw8bit": AdamW8bit, "adamw4bit": AdamW4bit, "adamwfp8": AdamWFp8}


def make_optimizer(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> optim.Optimizer:
    """AdamW, with moments in codes if so configured, or SGD; weight decay on parameters of two dimensions or more.

    seed: of stochastic rounding.
    """
    groups = _group(model, config)
    if config.optimizer in _LOW_BIT:
        options = {"update_clipping": config.update_clipping, "stochastic_rounding": config.bf16_weights, "seed": seed}
        return _LOW_BIT[config.optimizer](groups, config.lr, betas=BETAS, **options)
    if config.optimizer == "adamw":
        return optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())  # torch has no fused SGD of those
    return optim.SGD(groups, lr=config.lr, momentum=0.9, fused=not sharded)


def make_comm_optimizer(
    module: nn.Module, config: OptimizerConfig, steps: int, momentum_format: Recipe | None = None
) -> CommOptimizer | None:
    """The optimizer that decides what travels, for a run of `steps`; None for one that does not.

    module: a DistributedDataParallel module, which it is paired with, or another (see `CommOptimizer.make_exchange`).
    momentum_format: in place of the configuration's.
    """
    freeze_step = config.freeze_step or max(1, config.warmup, steps // 5)
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    momentum = momentum_format or config.momentum_format
    common: dict[str, Any] = {"params": _group(inner, config), "momentum_format": momentum}
    adam = {"betas": FROZEN_BETAS} | common
    match config.optimizer:
        case "onebit-adam":
            return OneBitAdam(module, config.lr, freeze_step=freeze_step, decoupled_weight_decay=True, **adam)
        case "onebit-lamb":
            return OneBitLamb(module, config.lr, freeze_step=freeze_step, **adam)
        case "zero-one-adam":
            # For runs of some thousand steps: the variance follows the gradients until the freeze, and ranks meet in
            # every fifth step then. Refreshes that grow rare, and meetings that do, lose more than they save there.
            return ZeroOneAdam(
                module,
                config.lr,
                var_freeze_step=freeze_step,
                var_update_scaler=freeze_step,
                local_step_scaler=1,
                local_step_clipper=5,
                decoupled_weight_decay=True,
                **adam,
            )
        case "birder":
            return Birder(module, config.lr, **common)
        case "ef-signsgd":
            return EFSignSGD(module, config.lr, 0.9, **common)
        case "signsgd-mv":
            return SignSGD(module, config.lr, 0.9, **common)
    return None


def _group(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step 1..steps: linear warm-up, then half a cosine down to `final_lr` of the peak."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
