"""How a parameter is cut into rows, and rows into blocks, so that the cut is the same on every mesh.

A parameter of shape (..., E, F) has rows of F elements, or E * F and so on where F is short; blocks never cross rows.
A mesh that shards rows out (FSDP2) therefore shares out whole blocks, and codes and scales are DTensors with the
parameter's own placements: saved on one mesh, loaded on another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

MIN_WIDTH = 64
"""Trailing dimensions are merged into a row until it has so many elements."""
MIN_NUMEL = 4096
"""Parameters with fewer elements, or with one dimension, keep float32 moments, whatever the mesh."""


@dataclass(frozen=True)
class Grid:
    """The rows of a parameter: `leading` dimensions count them, the others are their `width` elements."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    leading: int
    local_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where this rank's part begins in the whole."""

    @cached_property
    def rows(self) -> int:
        """Of this rank."""
        return prod(self.local_shape[: self.leading])

    @cached_property
    def width(self) -> int:
        """Elements that this rank has of a row."""
        return prod(self.local_shape[self.leading :])

    @cached_property
    def full_width(self) -> int:
        return prod(self.shape[self.leading :])

    @cached_property
    def first_column(self) -> int:
        """Where this rank's part of a row begins in the whole row."""
        column = 0
        for size, start in zip(self.shape[self.leading :], self.offset[self.leading :], strict=True):
            column = column * size + start
        return column

    def row_numbers(self, device: torch.device) -> Tensor:
        """int64 (rows,): the number of each of this rank's rows among all rows of the parameter."""
        numbers = torch.zeros((), dtype=torch.int64, device=device)
        for dim in range(self.leading):
            start, length = self.offset[dim], self.local_shape[dim]
            numbers = numbers[..., None] * self.shape[dim] + torch.arange(start, start + length, device=device)
        return numbers.reshape(-1)


def grid_of(parameter: Tensor) -> Grid:
    """The grid of a parameter, and this rank's part of it if it is a DTensor."""
    shape = tuple(parameter.shape)
    leading = max(0, len(shape) - 1)
    while leading > 1 and prod(shape[leading:]) < MIN_WIDTH:
        leading -= 1
    if isinstance(parameter, DTensor):
        local, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        return Grid(shape, leading, tuple(parameter._local_tensor.shape), tuple(offset) if local else (0,) * len(shape))
    return Grid(shape, leading, shape, (0,) * len(shape))


def has_codes(parameter: Tensor) -> bool:
    """Whether the moments of this parameter are codes. Judged by the whole parameter: the same on every mesh."""
    grid = grid_of(parameter)
    return len(grid.shape) >= 2 and prod(grid.shape) >= MIN_NUMEL and grid.full_width >= MIN_WIDTH


def check_block(parameter: Tensor, block: int) -> None:
    """ValueError if the mesh cuts through blocks."""
    grid = grid_of(parameter)
    if not isinstance(parameter, DTensor):
        return
    sharded = [p.dim % len(grid.shape) for p in parameter.placements if isinstance(p, Shard)]
    through = [dim for dim in sharded if dim >= grid.leading]
    if any(dim > grid.leading for dim in through) or (
        through and (grid.width % block or grid.full_width % max(1, grid.width))
    ):
        raise ValueError(
            f"a parameter of shape {grid.shape} with placements {parameter.placements}: found {grid.width} elements of "
            f"a row on this rank, expected a multiple of the block of {block} and the same on every rank, so that "
            "blocks are the same on every mesh; shard another dimension, or use another number of ranks"
        )


def make_like(parameter: Tensor, trailing: Callable[[int], int], dtype: torch.dtype) -> Tensor:
    """Zeros with `trailing(width)` elements in place of each row of `parameter`; a DTensor if it is one."""
    grid = grid_of(parameter)
    local_shape = (*grid.local_shape[: grid.leading], trailing(grid.width))
    local = torch.zeros(
        local_shape,
        dtype=dtype,
        device=parameter._local_tensor.device if isinstance(parameter, DTensor) else parameter.device,
    )
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((*grid.shape[: grid.leading], trailing(grid.full_width)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
