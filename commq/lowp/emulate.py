"""A GEMM in emulated low precision: quantize both operands, then multiply their exact values in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.codecs.rotation import Rotation, rotate
from commq.lowp.gemm import Gemm
from commq.lowp.quantize import Counter, quantized
from commq.lowp.random import random_signs

FIRST, SECOND, SIGNS = 0, 1, 2
"""What a GEMM's random bits are for; each has a stream of its own."""


def emulated(a_RC: Tensor, b_SC: Tensor, gemm: Gemm, counters: tuple[Counter, Counter, Counter]) -> Tensor:
    """a @ b.T with operands as `gemm` says: (R, S), float32, or the dtype of raw operands.

    The product is exact in its operands but for float32 sums (torch's default: no TF32). counters: of both operands and
    of the signs.
    """
    if gemm.rotation is not None:
        a_RC, b_SC = (rotated(each, gemm.rotation, counters[SIGNS]) for each in (a_RC, b_SC))
    a_RC, b_SC = quantized(a_RC, gemm.first, counters[FIRST]), quantized(b_SC, gemm.second, counters[SECOND])
    if a_RC.dtype != b_SC.dtype:
        a_RC, b_SC = a_RC.to(torch.float32), b_SC.to(torch.float32)
    product = a_RC @ b_SC.T
    return product if gemm.rotation is None else product * gain(gemm.rotation)


def rotated(x_RC: Tensor, rotation: Rotation, counter: Counter) -> Tensor:
    """Runs along the contraction rotated; padded with zeros to whole runs."""
    x_RC = F.pad(x_RC.to(torch.float32), (0, -x_RC.shape[1] % rotation.size)).contiguous()
    signs = None
    if rotation.signs:
        signs = random_signs(counter.step.to(x_RC.device), rotation.size, counter.seed, counter.stream)
    return rotate(x_RC.view(-1), rotation, signs).view(x_RC.shape)


def gain(rotation: Rotation) -> float:
    """`rotate` is orthogonal but for a factor sqrt(2) where log2(size) is odd: a product has it twice."""
    return 0.5 if (rotation.size.bit_length() - 1) % 2 else 1.0
