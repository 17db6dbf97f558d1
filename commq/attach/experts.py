"""Expert parallelism: tokens travel to the ranks that hold their experts, and back, in a format for each way.

    experts = Experts([make_expert() for _ in range(8)], group=group)   # 8 on each rank: of W ranks 8 W together
    y_TD = experts(x_TD, choice_TK, weight_TK)

    forward     dispatch (8 bits)            experts            combine (16 bits)
    backward    gradients of dispatch        experts            gradients of combine

Nothing is dropped and nothing is padded: each rank sends as many tokens as it has for each expert, which may be none.
The ranks first tell each other how many (plain integers), so the host waits for the device twice a call: for the range
of the choices, and for those numbers.

T tokens of a rank, D their width, K experts of each token, E experts of all ranks, L of this one, R tokens received.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commq.codecs.formats import Format
from commq.collectives import functional
from commq.collectives.lost import name_lost_ranks
from commq.collectives.wires import group_name, intern_wire, transport_named


class Experts(nn.Module):
    """This rank's experts, for the tokens of all ranks.

    experts: L modules, as many on every rank; each takes (n, D), n >= 0, and returns (n, D'). Rank r holds experts
        r * L, ..., (r + 1) * L - 1 of E = W * L.
    dispatch, combine: formats of tokens on their way to experts and of results on their way back.
    dispatch_gradient, combine_gradient: of the gradients of those, which travel the other way; None: the same formats.
    group: a ProcessGroup or a DeviceMesh of one dimension; None: all ranks.
    name: bytes are counted as `name`.dispatch and `name`.combine by `commq.functional.traffic`.

    All ranks call it, forward and backward, equally often. Parameters get the gradient of all ranks' tokens: do not
    average them once more over the group (DDP: `_set_params_and_buffers_to_ignore_for_model`), but divide them by W if
    the loss is a mean over ranks.
    Error: tokens arrive within `error_bound` of the dispatch format, and results within that of the combine format,
    block by block in each split; what stays on its rank is exact. Gradients likewise.
    Raises ValueError for formats that are none, and for no experts.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        *,
        group: functional.Group | None = None,
        dispatch: Format | str = "int8",
        combine: Format | str = "bf16",
        dispatch_gradient: Format | str | None = None,
        combine_gradient: Format | str | None = None,
        name: str = "experts",
    ) -> None:
        super().__init__()
        if not experts:
            raise ValueError(f"{name}: no experts, expected one or more, as many on every rank")
        self.experts = nn.ModuleList(experts)
        self.group = group_name(group)
        self.ways = {
            "dispatch": (dispatch, dispatch if dispatch_gradient is None else dispatch_gradient),
            "combine": (combine, combine if combine_gradient is None else combine_gradient),
        }
        self.name = name
        for format, gradient in self.ways.values():
            intern_wire(name, format, gradient, "nearest", None, 0)

    def forward(self, x_TD: Tensor, choice_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The sum over k of weight[t, k] times the result of expert choice[t, k] for token t: (T, D'), x's dtype.

        x_TD: float32, bfloat16 or float16, the same dtype on all ranks. choice_TK: int64, 0 to E - 1. weight_TK:
        floats, whose gradient is that for the results as they arrived.
        ValueError on a rank whose shapes do not fit or whose choices are out of range, before it sends anything; the
        others then time out.
        """
        if x_TD.ndim != 2 or choice_TK.ndim != 2 or len(choice_TK) != len(x_TD) or weight_TK.shape != choice_TK.shape:
            raise ValueError(
                f"{self.name}: tokens {tuple(x_TD.shape)}, choices {tuple(choice_TK.shape)} and weights "
                f"{tuple(weight_TK.shape)}, expected (T, D), (T, K) and (T, K)"
            )
        transport, (tokens, choices) = transport_named(self.group), choice_TK.shape
        sent_WL = self._count(choice_TK, transport.world_size)
        received_WL = torch.empty_like(sent_WL)
        try:
            dist.all_to_all_single(received_WL, sent_WL, group=transport.group)
        except RuntimeError as error:
            raise name_lost_ranks(transport.group, "all_to_all", error) from error
        counts = torch.cat((sent_WL.sum(1), received_WL.sum(1), received_WL.sum(0))).tolist()
        sent, received, of_experts = (
            counts[: transport.world_size],
            counts[transport.world_size : -len(self.experts)],
            counts[-len(self.experts) :],
        )

        order = choice_TK.flatten().argsort(stable=True)
        x_RD = self._exchange("dispatch", x_TD[order // choices], received, sent)
        # What arrived is in order of rank, then expert; experts want it in order of expert.
        expert_R = torch.arange(len(self.experts), device=x_TD.device).repeat(transport.world_size)
        by_expert = expert_R.repeat_interleave(received_WL.flatten(), output_size=sum(received)).argsort(stable=True)
        parts = x_RD[by_expert].split(of_experts)
        y_RD = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y_SD = self._exchange("combine", y_RD[by_expert.argsort()].to(x_TD.dtype), sent, received)
        y_TKD = y_SD[order.argsort()].unflatten(0, (tokens, choices))
        return (y_TKD * weight_TK[..., None].to(y_TKD.dtype)).sum(dim=1)

    def _count(self, choice_TK: Tensor, world_size: int) -> Tensor:
        """How many of this rank's tokens go to each expert: int64 (W, L)."""
        total = world_size * len(self.experts)
        if choice_TK.numel():
            lowest, highest = torch.stack(choice_TK.aminmax()).tolist()
            if lowest < 0 or highest >= total:
                raise ValueError(
                    f"{self.name}: a token for expert {lowest if lowest < 0 else highest}, expected 0 to {total - 1}: "
                    f"{len(self.experts)} on each of {world_size} ranks"
                )
        # Not torch.bincount, which waits for the device to learn what was just asked.
        ones_E = torch.ones_like(choice_TK, dtype=torch.int64).flatten()
        count_E = ones_E.new_zeros(total).scatter_add_(0, choice_TK.flatten().to(torch.int64), ones_E)
        return count_E.view(world_size, -1)

    def _exchange(self, way: str, x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        format, gradient = self.ways[way]
        return functional.all_to_all(
            x, received, sent, format=format, backward=gradient, group=self.group, name=f"{self.name}.{way}"
        )
