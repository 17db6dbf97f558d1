"""Adjoints: each exchange of `functional.py` as a function of autograd, with the exchange that its backward makes.

Arguments besides the tensor are those of `exchange_ops.py`; replicated: see `functional.all_reduce`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from commq.collectives import exchange_ops as ops
from commq.collectives import point_to_point
from commq.collectives.traffic import counted
from commq.collectives.wires import place_in, transport_named, wire_of


class AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, average: bool, replicated: bool, wire: str, group: str, step: int) -> Tensor:
        ctx.options = average, replicated, wire, group, step
        return ops.all_reduce(x, average, wire, group, step, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        average, replicated, wire, group, step = ctx.options
        if replicated:
            given = grad / place_in(group)[1] if average else grad
        else:
            given = ops.all_reduce(grad, average, wire, group, step, True)
        return given, None, None, None, None, None


class AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, replicated: bool, wire: str, group: str, step: int) -> Tensor:
        ctx.options = dim, replicated, wire, group, step
        return ops.all_gather(x, dim, wire, group, step, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dim, replicated, wire, group, step = ctx.options
        if replicated:
            given = _own(grad, dim, group)
        else:
            given = ops.reduce_scatter(grad, False, dim, wire, group, step, True)
        return given, None, None, None, None, None


class ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, average: bool, dim: int, wire: str, group: str, step: int) -> Tensor:
        ctx.options = average, dim, wire, group, step
        return ops.reduce_scatter(x, average, dim, wire, group, step, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        average, dim, wire, group, step = ctx.options
        given = ops.all_gather(grad, dim, wire, group, step, True)
        return given / place_in(group)[1] if average else given, None, None, None, None, None


class AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output_splits: list[int], input_splits: list[int], wire: str, group: str, step: int
    ) -> Tensor:
        ctx.options = input_splits, output_splits, wire, group, step
        return ops.all_to_all(x, output_splits, input_splits, wire, group, step, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ops.all_to_all(grad, *ctx.options, True), None, None, None, None, None


class Replicate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: str, group: str, step: int) -> Tensor:
        ctx.options = wire, group, step
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ops.all_reduce(grad, False, *ctx.options, True), None, None, None


class Shard(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, wire: str, group: str, step: int) -> Tensor:
        ctx.options = dim, wire, group, step
        return _own(x, dim, group).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ops.all_gather(grad, *ctx.options, True), None, None, None, None


class Send(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dst: int, wire: str, group: str, step: int) -> Tensor:
        ctx.options = dst, wire, group, step
        ctx.like = x.new_empty(()).expand(x.shape)
        _send(x, dst, wire, group, step, False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dst, wire, group, step = ctx.options
        return _recv(ctx.like, dst, wire, group, step, True), None, None, None, None


class Recv(Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, src: int, wire: str, group: str, step: int) -> Tensor:
        ctx.options = src, wire, group, step
        return _recv(like, src, wire, group, step, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        src, wire, group, step = ctx.options
        _send(grad, src, wire, group, step, True)
        return None, None, None, None, None


def _send(x: Tensor, dst: int, wire: str, group: str, step: int, backward: bool) -> None:
    transport, about = transport_named(group), wire_of(wire)
    with counted(transport, about.name, x.nbytes, backward=backward):
        options = about.options(step, backward=backward)
        point_to_point.send(x.contiguous(), dst, group=transport.group, **options)


def _recv(like: Tensor, src: int, wire: str, group: str, step: int, backward: bool) -> Tensor:
    y = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    transport, about = transport_named(group), wire_of(wire)
    point_to_point.recv(y, src, group=transport.group, **about.options(step, backward=backward))
    return y


def _own(x: Tensor, dim: int, group: str) -> Tensor:
    rank, world_size = place_in(group)
    length = x.shape[dim] // world_size
    return x.narrow(dim, rank * length, length)
