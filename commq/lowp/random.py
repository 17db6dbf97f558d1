"""Random bits of an operand and signs of a rotation: operators, which compiled graphs hold as they are.

Traces stay short, and keys that are symbols in a graph reach no generated code.
"""

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


@torch.library.custom_op("commq::lowp_signs", mutates_args=())
def random_signs(clock: Tensor, size: int, seed: int, stream: int) -> Tensor:
    """`size` signs for all runs of a rotation: those of `philox.random_signs`, on the device of clock."""
    bits = random_bits(clock, -(-size // 16), seed, stream)  # of the same counters: 16 signs are those of one element
    signs = 1 - 2 * ((bits[:, None] >> torch.arange(16, device=clock.device)) & 1)
    return signs.view(-1)[:size].to(torch.float32)


@random_signs.register_fake
def _(clock: Tensor, size: int, seed: int, stream: int) -> Tensor:
    return clock.new_empty(size, dtype=torch.float32)
