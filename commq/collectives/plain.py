"""Plain: the library's own all-reduce of the tensors as they are. What compression has to beat."""

from __future__ import annotations

import torch
import torch.distributed as dist

from commq.codecs.formats import Format
from commq.codecs.reference import Coding, load_residual, store_residual
from commq.collectives.message import Message, PartOperand
from commq.collectives.schedule import Schedule


def plain(message: Message, *, narrows: bool = True) -> Schedule:
    """All-reduce a piece without encoding: sums are the library's, in the tensors' own dtype.

    A residual is sent, too; what remains of it is what the tensor's dtype could not hold. Where it `narrows`,
    float32 whose format is bfloat16 is summed as that: each of the W roundings errs by 2**-9 of the partial sum.
    """
    for part in message.parts:
        if narrows and _is_narrowed(part):
            narrow = part.x.to(torch.bfloat16)
            yield message.transport.all_reduce(narrow, dist.ReduceOp.SUM)
            torch.div(narrow, message.divisor, out=part.out)
    whole = [part for part in message.parts if not (narrows and _is_narrowed(part))]
    for dtype in dict.fromkeys(part.x.dtype for part in whole):
        parts = [part for part in whole if part.x.dtype == dtype]
        for part in parts:
            _write(part)
        total = parts[0].out if len(parts) == 1 else torch.cat([part.out for part in parts])
        yield message.transport.all_reduce(total, dist.ReduceOp.SUM)
        if message.divisor != 1.0:
            total.div_(message.divisor)
        if len(parts) > 1:
            for part, run in zip(parts, total.split([part.x.numel() for part in parts]), strict=True):
                part.out.copy_(run)


def is_narrow(dtype: torch.dtype, fmt: Format, coding: Coding) -> bool:
    """Whether a tensor of `dtype` is summed as bfloat16. Not where random bits are asked for: codecs draw them."""
    return dtype == torch.float32 and fmt.name == "bf16" and coding.rounding == "nearest"


def _is_narrowed(part: PartOperand) -> bool:
    return is_narrow(part.x.dtype, part.part.layout.format, part.coding)


def _write(part: PartOperand) -> None:
    """out <- x + residual; residual <- what was lost, where that is finite."""
    if part.residual is None:
        if part.out.data_ptr() != part.x.data_ptr():
            part.out.copy_(part.x)
        return
    block = part.part.layout.format.block
    e = load_residual(part.residual, part.residual_scales, block)
    h = part.x.to(torch.float32) + e
    part.out.copy_(h)
    lost = (h - part.out) * (1.0 - part.decay) + e * part.decay
    store_residual(lost, part.out.isfinite(), part.residual, part.residual_scales, block)
