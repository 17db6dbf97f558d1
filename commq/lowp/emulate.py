"""A GEMM in emulated low precision: quantize both operands, then multiply their exact values in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from commq.codecs.rotation import Rotation
from commq.lowp.gemm import Gemm
from commq.lowp.quantize import Counter
from commq.lowp.values import values

FIRST, SECOND, SIGNS = 0, 1, 2
"""What a GEMM's random bits are for; each has a stream of its own."""


def emulated(a_RC: Tensor, b_SC: Tensor, gemm: Gemm, counters: tuple[Counter, Counter, Counter]) -> Tensor:
    """a @ b.T with operands as `gemm` says: (R, S), float32, or the dtype of raw operands.

    The product is exact in its operands but for float32 sums (torch's default: no TF32). counters: of both operands and
    of the signs.
    """
    a_RC, b_SC = (
        values(each, operand, counter, gemm.rotation, counters[SIGNS])
        for each, operand, counter in ((a_RC, gemm.first, counters[FIRST]), (b_SC, gemm.second, counters[SECOND]))
    )
    if a_RC.dtype != b_SC.dtype:
        a_RC, b_SC = a_RC.to(torch.float32), b_SC.to(torch.float32)
    product = a_RC @ b_SC.T
    factor = 1.0 if gemm.rotation is None else gain(gemm.rotation)
    return product if factor == 1.0 else product * factor


def gain(rotation: Rotation) -> float:
    """`rotate` is orthogonal but for a factor sqrt(2) where log2(size) is odd: a product has it twice."""
    return 0.5 if (rotation.size.bit_length() - 1) % 2 else 1.0
