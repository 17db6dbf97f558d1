"""Optimizers and the learning rate of a step."""

import math

from torch import nn, optim

from commq.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """AdamW or SGD over all parameters; weight decay on those with two dimensions or more."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    return optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step 1..steps: linear warm-up, then half a cosine down to `final_lr` of the peak."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
