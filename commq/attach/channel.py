"""Channel: one direction between the ranks of two stages, with a connection of its own.

torch's schedules may put all transfers of a rank on one NCCL stream, one after another: a stage that receives does not
send meanwhile, and the next receive begins when the computation before it has ended. What is sent on a channel arrives
in order, beside all other traffic, and receives can be posted ahead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from commq.collectives.memory import memory_of


class Channel:
    """Both ranks make the channels with one name in the same order; nobody else takes part."""

    def __init__(self, group: dist.ProcessGroup, ranks: tuple[int, int], name: str, device: torch.device) -> None:
        """ranks: in `group`, this rank's among them; the first is 0 on the channel. device: of what is sent."""
        # dist.new_group would take all ranks of the job, or as many groups on both ranks.
        facts, key = memory_of(group).facts, ("channels", name)
        facts[key] = facts.get(key, 0) + 1
        store = PrefixStore(f"commq/channel/{name}/{facts[key]}/", group.get_group_store())
        rank = ranks.index(dist.get_rank(group))
        self._peer = 1 - rank
        like = group._get_backend(device)
        timeout = like.options._timeout
        self._backend: Any
        if like.name() == "gloo":
            self._backend = dist.ProcessGroupGloo(store, rank, 2, timeout=timeout)
        elif like.name() == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backend = dist.ProcessGroupNCCL(store, rank, 2, options)
        else:
            raise ValueError(f"a channel on {like.name()}, expected gloo or nccl; give the stages ahead=0")

    def send(self, buffer: Tensor) -> dist.Work:
        """Contiguous; not to be changed before the work is waited for."""
        work: dist.Work = self._backend.send([buffer], self._peer, 0)
        return work

    def receive(self, buffer: Tensor) -> dist.Work:
        """Contiguous; not to be read before the work is waited for."""
        work: dist.Work = self._backend.recv([buffer], self._peer, 0)
        return work
