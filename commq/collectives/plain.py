"""Plain: the library's own all-reduce of the tensors as they are. What compression has to beat."""

from __future__ import annotations

import torch
import torch.distributed as dist

from commq.collectives.message import Message
from commq.collectives.schedule import Schedule


def plain(message: Message) -> Schedule:
    """All-reduce a piece without encoding: sums are the library's, in the tensors' own dtype."""
    for dtype in dict.fromkeys(part.x.dtype for part in message.parts):
        parts = [part for part in message.parts if part.x.dtype == dtype]
        total = parts[0].out if len(parts) == 1 else torch.cat([part.x for part in parts])
        if len(parts) == 1 and total.data_ptr() != parts[0].x.data_ptr():
            total.copy_(parts[0].x)
        yield message.transport.all_reduce(total, dist.ReduceOp.SUM)
        if message.divisor != 1.0:
            total.div_(message.divisor)
        if len(parts) > 1:
            for part, run in zip(parts, total.split([part.x.numel() for part in parts]), strict=True):
                part.out.copy_(run)
