"""What the styles of tensor_parallel.py make of modules: the module's own arithmetic on this rank's parts.

Parameters may be DTensors or plain local parts. `link` says what the layer exchanges with the others, and how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from commq.codecs.formats import Format
from commq.collectives import functional


@dataclass(frozen=True, kw_only=True)
class Link:
    """The exchanges of a layer: formats, layouts and the group, by name (a group cannot be copied, a module can)."""

    name: str
    format: Format | str
    gradient: Format | str
    group: str
    rank: int
    world_size: int
    input_layout: Placement
    output_layout: Placement
    use_local_output: bool

    @property
    def schedule(self) -> str:
        return "one_shot" if self.world_size == 2 else "two_shot"

    def local(self, x: Any) -> Tensor:
        """The input as a local tensor; it comes in the input's layout."""
        if not isinstance(x, DTensor):
            return x
        if len(x.placements) != 1 or not _same(x.placements[0], self.input_layout, x.dim()):
            raise ValueError(
                f"{self.name} style: an input with placements {x.placements}, expected {self.input_layout}; "
                "redistribute it, or give the style its layout as input_layouts"
            )
        return x.to_local()

    def leave(self, y: Tensor, weight: Tensor) -> Any:
        """The output as it was asked for."""
        if self.use_local_output or not isinstance(weight, DTensor):
            return y
        return DTensor.from_local(y, weight.device_mesh, [self.output_layout], run_check=False)

    def whole(self, x: Tensor) -> Tensor:
        """An input that every rank needs in full."""
        if isinstance(self.input_layout, Shard):
            return functional.all_gather(
                x,
                dim=self.input_layout.dim,
                format=self.format,
                backward=self.gradient,
                group=self.group,
                name=self.name,
            )
        return functional.replicate(x, format=self.gradient, schedule=self.schedule, group=self.group, name=self.name)

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of the last dimension."""
        if isinstance(self.input_layout, Shard):
            return x
        return functional.shard(x, dim=-1, format=self.gradient, group=self.group, name=self.name)

    def gathered(self, y: Tensor) -> Tensor:
        """Parts of the last dimension, together if the output is whole."""
        if isinstance(self.output_layout, Shard):
            return y
        return functional.all_gather(
            y, dim=-1, replicated=True, format=self.format, backward=self.gradient, group=self.group, name=self.name
        )

    def reduced(self, y: Tensor) -> Tensor:
        """The sum of what the ranks computed, or this rank's part of it."""
        if isinstance(self.output_layout, Shard):
            if self.output_layout.dim % y.dim() == y.dim() - 1:
                raise ValueError(
                    f"{self.name} style: output_layouts={self.output_layout} of {tuple(y.shape)}, expected a dimension "
                    "before the last"
                )
            return functional.reduce_scatter(
                y,
                dim=self.output_layout.dim,
                format=self.format,
                backward=self.gradient,
                group=self.group,
                name=self.name,
            )
        return functional.all_reduce(
            y,
            replicated=True,
            format=self.format,
            backward=self.gradient,
            schedule=self.schedule,
            group=self.group,
            name=self.name,
        )

    def shared(self, parameter: Tensor | None, *, parts: bool) -> Tensor | None:
        """A parameter that all ranks hold in full; with `parts`, each uses it on its part of the tokens."""
        if parameter is None:
            return None
        here = local(parameter)
        return functional.replicate(here, format="fp32", group=self.group, name=self.name) if parts else here


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _same(found: Placement, expected: Placement, dims: int) -> bool:
    if isinstance(found, Shard) and isinstance(expected, Shard):
        return found.dim % dims == expected.dim % dims
    return found == expected


class ColwiseLinear(nn.Linear):
    link: Link

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        y = nnf.linear(self.link.whole(self.link.local(x)), local(self.weight), bias)
        return self.link.leave(self.link.gathered(y), self.weight)


class RowwiseLinear(nn.Linear):
    link: Link

    def forward(self, x: Tensor) -> Tensor:
        y = self.link.reduced(nnf.linear(self.link.own(self.link.local(x)), local(self.weight)))
        bias = self.link.shared(self.bias, parts=isinstance(self.link.output_layout, Shard))
        return self.link.leave(y if bias is None else y + bias.to(y.dtype), self.weight)


class ColwiseEmbedding(nn.Embedding):
    link: Link

    def forward(self, index: Tensor) -> Tensor:
        y = nnf.embedding(
            self.link.local(index), local(self.weight), self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse,
        )  # fmt: skip
        return self.link.leave(self.link.gathered(y), self.weight)


class RowwiseEmbedding(nn.Embedding):
    link: Link

    def forward(self, index: Tensor) -> Tensor:
        weight = local(self.weight)
        first = self.link.rank * len(weight)
        place = self.link.local(index) - first
        here = (place >= 0) & (place < len(weight))
        padding = None if self.padding_idx is None else self.padding_idx - first
        if padding is not None and not 0 <= padding < len(weight):
            padding = None
        rows = nnf.embedding(
            place.clamp(0, len(weight) - 1), weight, padding, None, 2.0, self.scale_grad_by_freq, self.sparse
        )
        return self.link.leave(self.link.reduced(rows.masked_fill(~here[..., None], 0.0)), self.weight)


class SequenceLayerNorm(nn.LayerNorm):
    link: Link

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.link.shared(each, parts=True) for each in (self.weight, self.bias))
        y = nnf.layer_norm(self.link.local(x), self.normalized_shape, weight, bias, self.eps)
        return y if self.weight is None else self.link.leave(y, self.weight)


class SequenceRMSNorm(nn.RMSNorm):
    link: Link

    def forward(self, x: Tensor) -> Tensor:
        weight = self.link.shared(self.weight, parts=True)
        y = nnf.rms_norm(self.link.local(x), self.normalized_shape, weight, self.eps)
        return y if self.weight is None else self.link.leave(y, self.weight)
