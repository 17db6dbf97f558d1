"""The values that an operand's codes stand for: an operator, which compiled graphs hold as it is.

On a GPU one Triton kernel rotates, encodes and decodes (triton_quantize.py). On a CPU, and for operands that no kernel
serves (second terms of outliers, tiles of other sizes), it is the plain torch of `quantize.py`: the same bits.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from commq.codecs.rotation import Rotation
from commq.lowp.operand import Operand
from commq.lowp.operand import operand as read_operand
from commq.lowp.quantize import Counter, quantized, raw, rotated


def values(x_RC: Tensor, operand: Operand, counter: Counter, rotation: Rotation | None, signs: Counter) -> Tensor:
    """`quantized` of x_RC, after `rotated` if there is a rotation: float32 (R, C), C rounded up to whole runs.

    Raw operands keep their dtype. signs: where those of a rotation come from.
    """
    if operand.is_raw:
        return raw(x_RC, operand)
    size, random = (0, False) if rotation is None else (rotation.size, rotation.signs)
    return torch.ops.commq.lowp_quantize(
        x_RC, counter.step.to(x_RC.device), str(operand), operand.format.scale, size, random,
        [counter.seed, counter.stream, signs.stream],
    )  # fmt: skip


@cache
def _operand(text: str, scale: str) -> Operand:
    found = read_operand(text)
    return replace(found, format=replace(found.format, scale=scale))  # type: ignore[arg-type]


def _empty(x_RC: Tensor, rotation: int) -> Tensor:
    rows, columns = x_RC.shape
    width = -(-columns // rotation) * rotation if rotation else columns
    return x_RC.new_empty((rows, width), dtype=torch.float32)


@torch.library.custom_op("commq::lowp_quantize", mutates_args=())
def _lowp_quantize(
    x: Tensor, clock: Tensor, operand: str, scale: str, rotation: int, signs: bool, key: list[int]
) -> Tensor:
    what = _operand(operand, scale)
    counter, of_signs = (Counter(key[0], stream, clock) for stream in key[1:])
    kernels = None
    if x.numel() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        kernels = importlib.import_module("commq.lowp.triton_quantize")
    if rotation and not (kernels and kernels.serves(what) and kernels.rotates(what, rotation)):
        x, rotation = rotated(x, Rotation(size=rotation, signs=signs), of_signs), 0
    if kernels is None or not kernels.serves(what):
        return quantized(x, what, counter).contiguous()
    out = _empty(x, rotation)
    kernels.quantize(x, out, what, clock, rotation, signs and rotation > 0, (key[0], key[1], key[2]))
    return out


@_lowp_quantize.register_fake
def _(x: Tensor, clock: Tensor, operand: str, scale: str, rotation: int, signs: bool, key: list[int]) -> Tensor:
    return _empty(x, rotation)
