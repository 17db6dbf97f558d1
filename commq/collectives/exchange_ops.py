"""The exchanges as ops of torch: a tensor in, a new tensor out, in the format of one direction of a wire.

torch.compile takes each as one node of its graph and does not look inside. All ranks call the same ones in the same
order. Arguments besides the tensor: see `wires.py` for `wire` and `group`; step: counter of stochastic rounding;
backward: in which direction of the wire.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op

from commq.collectives import all_gather as gather_api
from commq.collectives import all_reduce as reduce_api
from commq.collectives import all_to_all as exchange_api
from commq.collectives import reduce_scatter as scatter_api
from commq.collectives.plan import ring_bytes
from commq.collectives.traffic import counted
from commq.collectives.wires import transport_named, wire_of


def _op(average: bool) -> dist.ReduceOp.RedOpType:
    return dist.ReduceOp.AVG if average else dist.ReduceOp.SUM


@custom_op("commq::all_reduce", mutates_args=())
def all_reduce(x: Tensor, average: bool, wire: str, group: str, step: int, backward: bool) -> Tensor:
    """The sum or average over ranks."""
    transport, about = transport_named(group), wire_of(wire)
    y = x.clone(memory_format=torch.contiguous_format)
    raw = ring_bytes(x.numel(), x.element_size(), transport.world_size)
    with counted(transport, about.name, raw, backward=backward):
        options = about.options(step, backward=backward)
        reduce_api.all_reduce(y, _op(average), schedule=about.schedule, group=transport.group, **options)
    return y


@custom_op("commq::all_gather", mutates_args=())
def all_gather(x: Tensor, dim: int, wire: str, group: str, step: int, backward: bool) -> Tensor:
    """The ranks' tensors, one after the other along `dim`."""
    transport, about = transport_named(group), wire_of(wire)
    y = x.new_empty((transport.world_size, *x.shape))
    raw = (transport.world_size - 1) * x.nbytes
    with counted(transport, about.name, raw, backward=backward):
        gather_api.all_gather(y, x.contiguous(), group=transport.group, **about.options(step, backward=backward))
    return y.movedim(0, dim).flatten(dim, dim + 1).contiguous()


@custom_op("commq::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, average: bool, dim: int, wire: str, group: str, step: int, backward: bool) -> Tensor:
    """This rank's part, along `dim`, of the sum or average over ranks."""
    transport, about = transport_named(group), wire_of(wire)
    world_size = transport.world_size
    parts = x.unflatten(dim, (world_size, x.shape[dim] // world_size)).movedim(dim, 0).contiguous()
    y = torch.empty_like(parts[0])
    raw = (world_size - 1) * y.nbytes
    with counted(transport, about.name, raw, backward=backward):
        options = about.options(step, backward=backward)
        scatter_api.reduce_scatter(y, parts, _op(average), group=transport.group, **options)
    return y


@custom_op("commq::all_to_all", mutates_args=())
def all_to_all(
    x: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    wire: str,
    group: str,
    step: int,
    backward: bool,
) -> Tensor:
    """Split w of what comes back is rank w's split for this rank; both lists are empty where splits are equal."""
    transport, about = transport_named(group), wire_of(wire)
    rows = sum(output_splits) if output_splits else x.shape[0]
    y = x.new_empty((rows, *x.shape[1:]))
    kept = input_splits[transport.rank] if input_splits else x.shape[0] // transport.world_size
    raw = (x.shape[0] - kept) * x.shape[1:].numel() * x.element_size()
    with counted(transport, about.name, raw, backward=backward):
        exchange_api.all_to_all(
            y,
            x.contiguous(),
            list(output_splits) or None,
            list(input_splits) or None,
            group=transport.group,
            **about.options(step, backward=backward),
        )
    return y


@all_reduce.register_fake
def _(x: Tensor, average: bool, wire: str, group: str, step: int, backward: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@all_gather.register_fake
def _(x: Tensor, dim: int, wire: str, group: str, step: int, backward: bool) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= transport_named(group).world_size
    return x.new_empty(shape)


@reduce_scatter.register_fake
def _(x: Tensor, average: bool, dim: int, wire: str, group: str, step: int, backward: bool) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= transport_named(group).world_size
    return x.new_empty(shape)


@all_to_all.register_fake
def _(
    x: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    wire: str,
    group: str,
    step: int,
    backward: bool,
) -> Tensor:
    rows = sum(output_splits) if output_splits else x.shape[0]
    return x.new_empty((rows, *x.shape[1:]))
