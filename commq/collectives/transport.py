"""Transport: the two moves of rows of bytes that schedules are made of, over torch.distributed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed all_gather_into_tensor.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class C10d:
    """Rows over a process group (NCCL, gloo). On CUDA the moves are ordered on the current stream."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of the group it was given")
        # gloo's all-gather is seven times slower than its all-to-all of the same bytes.
        self._gather_by_all_to_all = dist.get_backend(group) == "gloo"

    def all_to_all(self, send_WS: Tensor, recv_WS: Tensor, *, async_op: bool = False) -> dist.Work | None:
        """Row w of `send` goes to rank w; row w of `recv` comes from rank w. uint8, contiguous, (W, S)."""
        return dist.all_to_all_single(recv_WS, send_WS, group=self.group, async_op=async_op)

    def all_gather(self, row_S: Tensor, out_WS: Tensor) -> None:
        """Row w of `out` comes from rank w. uint8, contiguous, (S,) and (W, S)."""
        if self._gather_by_all_to_all:
            self.all_to_all(row_S.expand(self.world_size, -1).contiguous(), out_WS)
        else:
            _all_gather_single(out_WS.view(-1), row_S, group=self.group)


def check_equal(what: str, value: str, group: dist.ProcessGroup | None) -> None:
    """Raise the same ValueError on every rank unless all ranks of `group` hold the same `value`."""
    values: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    if len(set(values)) > 1:
        other = next(rank for rank, v in enumerate(values) if v != values[0])
        raise ValueError(
            f"{what} differs between ranks: rank 0 has {values[0]}, rank {other} has {values[other]}; "
            "start every rank with the same one"
        )
