"""Shortcuts: calls that were found to travel plain go straight to the library's all-reduce.

Over a fast link a short message takes less time than finding out anew what to do with it: everything that a call
depends on is one key in the group's memory, and what stands there does the rest.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllreduceOptions

from commq.collectives.lost import name_lost_ranks
from commq.collectives.memory import Memory, known_memory
from commq.collectives.plan import ring_bytes
from commq.collectives.transport import C10d, Transport


@dataclass(frozen=True)
class Shortcut:
    """An all-reduce of tensors of one length and dtype, in place; sums are the library's.

    It does not hold its group, whose memory holds it.
    """

    options: AllreduceOptions
    memory: Memory
    nbytes: int
    """That each rank sends, counted as a ring."""
    divisor: int
    """World size for an average, else 1."""

    def run(self, tensor: Tensor, group: dist.ProcessGroup | None) -> None:
        """As dist.all_reduce(tensor, group=group), which asks some more questions before it does this."""
        group = group or dist.group.WORLD
        assert group is not None
        self.memory.sent_bytes += self.nbytes
        if tensor.requires_grad:
            tensor = tensor.detach()
        try:
            work = group.allreduce([tensor], self.options)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise name_lost_ranks(group, "all_reduce", error) from error
        if self.divisor != 1:
            tensor.div_(self.divisor)


def find_shortcut(group: object, key: Hashable) -> Shortcut | None:
    """What `add_shortcut` put there, for process groups; None if nothing is known of such a call."""
    if group is None:
        group = dist.group.WORLD
    elif not isinstance(group, dist.ProcessGroup):
        return None
    memory = known_memory(group)
    found: Shortcut | None = None if memory is None else memory.notes.get(key)
    return found


def add_shortcut(transport: Transport, key: Hashable, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """Calls with this key all-reduce tensors that look like this one plainly from now on. Not over MPI."""
    if not isinstance(transport, C10d):
        return
    options = AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
    options.asyncOp = False
    nbytes = ring_bytes(tensor.numel(), tensor.element_size(), transport.world_size)
    divisor = transport.world_size if op == dist.ReduceOp.AVG else 1
    transport.memory.note(key, Shortcut(options, transport.memory, nbytes, divisor))
