"""Plain: the library's own all-reduce of the tensors as they are. What compression has to beat."""

from __future__ import annotations

import torch
import torch.distributed as dist

from commq.codecs.reference import load_residual, store_residual
from commq.collectives.message import Message, PartOperand
from commq.collectives.schedule import Schedule


def plain(message: Message) -> Schedule:
    """All-reduce a piece without encoding: sums are the library's, in the tensors' own dtype.

    A residual is sent, too; what remains of it is what the tensor's dtype could not hold.
    """
    for dtype in dict.fromkeys(part.x.dtype for part in message.parts):
        parts = [part for part in message.parts if part.x.dtype == dtype]
        for part in parts:
            _write(part)
        total = parts[0].out if len(parts) == 1 else torch.cat([part.out for part in parts])
        yield message.transport.all_reduce(total, dist.ReduceOp.SUM)
        if message.divisor != 1.0:
            total.div_(message.divisor)
        if len(parts) > 1:
            for part, run in zip(parts, total.split([part.x.numel() for part in parts]), strict=True):
                part.out.copy_(run)


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
