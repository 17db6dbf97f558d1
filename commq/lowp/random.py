"""Random bits of an operand: an operator, so that compiled graphs hold it as it is and traces stay short."""

from __future__ import annotations

import importlib
import os

import torch
from torch import Tensor

from commq.codecs.philox import random_u16


@torch.library.custom_op("commq::lowp_random", mutates_args=())
def random_bits(clock: Tensor, count: int, seed: int, stream: int) -> Tensor:
    """16 random bits for each of `count` elements: int32 (count,) in [0, 2**16), those of `random_u16` in runs of 16.

    clock: int64, one number: the step.
    """
    if clock.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        out = torch.empty(count, dtype=torch.int32, device=clock.device)
        importlib.import_module("commq.lowp.triton_random").fill(out, clock, seed, stream)
        return out
    runs = torch.arange(-(-count // 16), device=clock.device)
    bits = random_u16(runs, 16, seed=seed, step=clock, stream=stream)
    return bits.to(torch.int32).view(-1)[:count].clone()


@random_bits.register_fake
def _(clock: Tensor, count: int, seed: int, stream: int) -> Tensor:
    return clock.new_empty(count, dtype=torch.int32)
