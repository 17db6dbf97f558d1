"""Differentiable exchanges, in the style of torch.distributed.nn.functional: values and gradients travel encoded.

    y = commq.functional.all_reduce(x, format="int8", backward="int8", group=group)

Each function returns a new tensor. Its gradient is the uncompressed function's, of values as they were decoded
(straight through): the adjoint exchange of the gradients, in a format of its own.

    forward           backward
    all_reduce        all_reduce          replicated: nothing
    all_gather        reduce_scatter      replicated: the own part
    reduce_scatter    all_gather
    all_to_all        all_to_all back
    replicate         all_reduce          forward: nothing
    shard             all_gather          forward: the own part
    send              recv
    recv              send

What all have in common:
format: Format or name for the values. backward: for the gradients; None: the same one.
group: a ProcessGroup, its name, a DeviceMesh of one dimension, None for all ranks.
rounding, rotation, seed: as those of `commq.all_reduce`; formats without scales are not rotated.
step: a number that changes from call to call when rounding is stochastic. Random bits are counted from it and `seed`
alone, so a checkpointed layer that is computed again with the same step sends the same bytes. With nearest rounding it
always does.
name: what `commq.functional.traffic` counts its bytes as; None: the function's own name.
Errors are those of the collectives, in both directions: the bound of the gradient is the adjoint's. TypeError and
ValueError come before anything is sent; a rank that is lost is named (RankLostError), in backward too.

torch.compile takes all but send and recv into its graph (as ops `commq::all_reduce` and so on, which policies of
selective checkpointing may save); send and recv break the graph and run outside of it. Splits of all_to_all that are
read from a tensor break it where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from commq.codecs.formats import Format
from commq.codecs.rotation import Rotation
from commq.collectives import adjoints
from commq.collectives.wires import group_name, intern_wire, place_in

Group = dist.ProcessGroup | DeviceMesh | str
Rounding = Literal["nearest", "stochastic"]


def all_reduce(
    x: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    *,
    format: Format | str,
    backward: Format | str | None = None,
    replicated: bool = False,
    schedule: str = "two_shot",
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """The sum or average of the ranks' tensors, all of x's shape.

    replicated: all ranks compute the same from the result, so that its gradient is the same on all. It then is x's
    (AVG: divided by W), and nothing is sent backward. Otherwise the ranks' gradients are summed or averaged like x.
    schedule: see `commq.all_reduce`.
    """
    average = _check_op("all_reduce", op)
    wire = intern_wire(name or "all_reduce", format, backward, rounding, rotation, seed, schedule)
    y: Tensor = adjoints.AllReduce.apply(x, average, replicated, wire, group_name(group), step)
    return y


def all_gather(
    x: Tensor,
    *,
    dim: int = 0,
    format: Format | str,
    backward: Format | str | None = None,
    replicated: bool = False,
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """The ranks' tensors, all of x's shape, one after the other along `dim`.

    replicated: as for `all_reduce`; backward then takes the own part of the gradient. Otherwise parts of the ranks'
    gradients are summed.
    """
    wire = intern_wire(name or "all_gather", format, backward, rounding, rotation, seed)
    y: Tensor = adjoints.AllGather.apply(x, _dim("all_gather", x, dim), replicated, wire, group_name(group), step)
    return y


def reduce_scatter(
    x: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    *,
    dim: int = 0,
    format: Format | str,
    backward: Format | str | None = None,
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """This rank's part, along `dim`, of the sum or average of the ranks' tensors. W divides x.shape[dim]."""
    average = _check_op("reduce_scatter", op)
    wire = intern_wire(name or "reduce_scatter", format, backward, rounding, rotation, seed)
    where, dim = group_name(group), _dim("reduce_scatter", x, dim)
    _check_divides("reduce_scatter", x, dim, where)
    y: Tensor = adjoints.ReduceScatter.apply(x, average, dim, wire, where, step)
    return y


def all_to_all(
    x: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    *,
    format: Format | str,
    backward: Format | str | None = None,
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """Split w of x goes to rank w, and split w of the result comes from it; backward the other way round.

    Splits are along dimension 0, and may be empty. Pass both lists, or neither for equal splits, on all ranks. The
    split that a rank sends to itself is exact.
    """
    if (output_split_sizes is None) != (input_split_sizes is None):
        raise ValueError("all_to_all: one list of split sizes, expected both or neither: backward needs the other one")
    if x.dim() < 1 or min(output_split_sizes or (0,)) < 0:
        raise ValueError(
            f"all_to_all: output_split_sizes={output_split_sizes} of a tensor with {x.dim()} dimensions, expected "
            "lengths of 0 or more along dimension 0"
        )
    wire = intern_wire(name or "all_to_all", format, backward, rounding, rotation, seed)
    splits = list(output_split_sizes or ()), list(input_split_sizes or ())
    y: Tensor = adjoints.AllToAll.apply(x, *splits, wire, group_name(group), step)
    return y


def replicate(
    x: Tensor,
    *,
    format: Format | str,
    schedule: str = "two_shot",
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """x, which is the same on all ranks and of which each computes something else: their gradients are summed.

    format: for the gradients; nothing is sent forward. schedule: see `commq.all_reduce`.
    """
    wire = intern_wire(name or "replicate", format, None, rounding, rotation, seed, schedule)
    y: Tensor = adjoints.Replicate.apply(x, wire, group_name(group), step)
    return y


def shard(
    x: Tensor,
    *,
    dim: int = 0,
    format: Format | str,
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """This rank's part, along `dim`, of x, which is the same on all ranks: their gradients are gathered.

    format: for the gradients; nothing is sent forward. W divides x.shape[dim].
    """
    wire = intern_wire(name or "shard", format, None, rounding, rotation, seed)
    where, dim = group_name(group), _dim("shard", x, dim)
    _check_divides("shard", x, dim, where)
    y: Tensor = adjoints.Shard.apply(x, dim, wire, where, step)
    return y


def send(
    x: Tensor,
    dst: int,
    *,
    format: Format | str,
    backward: Format | str | None = None,
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """Send x to rank `dst` of the group, which calls `recv`.

    Returns a zero without dimensions. Its backward (`zero.backward()`, or as a term of the loss) receives x's gradient
    from `dst`, if x takes part in autograd; the receiver's tensor must then take part in it as well.
    """
    wire = intern_wire(name or "send", format, backward, rounding, rotation, seed)
    zero: Tensor = adjoints.Send.apply(x, dst, wire, group_name(group), step)
    return zero


def recv(
    like: Tensor,
    src: int,
    *,
    format: Format | str,
    backward: Format | str | None = None,
    group: Group | None = None,
    rounding: Rounding = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    name: str | None = None,
) -> Tensor:
    """The tensor that rank `src` of the group sends with `send` and the same arguments.

    like: of the tensor's shape, dtype and device; what it holds is not read. If it requires a gradient, so does the
    result, whose backward sends its gradient to `src`; `like` gets none.
    """
    wire = intern_wire(name or "recv", format, backward, rounding, rotation, seed)
    y: Tensor = adjoints.Recv.apply(like, src, wire, group_name(group), step)
    return y


def _check_op(what: str, op: dist.ReduceOp.RedOpType) -> bool:
    """Whether it is the average."""
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        raise ValueError(f"{what}: op {op}, expected ReduceOp.SUM or ReduceOp.AVG")
    return op == dist.ReduceOp.AVG


def _dim(what: str, x: Tensor, dim: int) -> int:
    """The dimension counted from 0."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{what}: dim={dim} of a tensor with {x.dim()} dimensions")
    return dim % x.dim()


def _check_divides(what: str, x: Tensor, dim: int, group: str) -> None:
    world_size = place_in(group)[1]
    if x.shape[dim] % world_size:
        raise ValueError(
            f"{what}: {x.shape[dim]} elements along dimension {dim} of {tuple(x.shape)}, expected a multiple of "
            f"{world_size}, one part for each rank; pad the tensor"
        )
