"""Styles for torch's `parallelize_module` whose activations and gradients travel encoded.

    from torch.distributed.tensor.parallel import parallelize_module
    from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel

    parallelize_module(mlp, mesh, {"up": ColwiseParallel(format="int8"), "down": RowwiseParallel(format="spike5")})

They take torch's layouts and make torch's DTensor parameters; checkpoints, FSDP2 and optimizers see no difference. The
exchanges are those of `commq.functional`, between the local tensors:

    style     layout                 forward, in `format`      backward, in `gradient`
    Colwise   input Replicate        nothing                   all-reduce
              input Shard(d)         all-gather along d        reduce-scatter
              output Shard(-1)       nothing                   nothing
              output Replicate       all-gather                nothing
    Rowwise   input Shard(-1)        nothing                   nothing
              input Replicate        nothing                   all-gather
              output Replicate       all-reduce                nothing
              output Shard(d)        reduce-scatter along d    all-gather
    Sequence  Shard(d)               nothing                   all-reduce of its parameters' gradients, as fp32

Every all-reduce leaves the same bits on all ranks, so parameters that all ranks hold in full stay equal without being
exchanged. In a group of two ranks it is one_shot, which sends as much as two_shot and encodes once.
A module that is parallelized gets a subclass of its class (as with FSDP2): no hooks, and torch.compile takes it whole.
What travelled: `commq.functional.traffic(mesh)`, under the name of the style.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from commq.attach.parallel_layers import (
    ColwiseEmbedding,
    ColwiseLinear,
    Link,
    RowwiseEmbedding,
    RowwiseLinear,
    SequenceLayerNorm,
    SequenceRMSNorm,
)
from commq.codecs.formats import Format
from commq.collectives.wires import intern_wire


class _Style(ParallelStyle):
    """What the styles have in common: formats, and how a module becomes parallel."""

    layers: ClassVar[dict[type[nn.Module], type[nn.Module]]]

    def __init__(
        self,
        input_layout: Placement,
        output_layout: Placement,
        use_local_output: bool,
        format: Format | str,
        gradient: Format | str | None,
        name: str,
    ) -> None:
        super().__init__()
        self.input_layout, self.output_layout, self.use_local_output = input_layout, output_layout, use_local_output
        self.format, self.gradient, self.name = format, format if gradient is None else gradient, name
        intern_wire(name, self.format, self.gradient, "nearest", None, 0)  # ValueError here, not at the first step

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layout}, output_layouts={self.output_layout}, "
            f"use_local_output={self.use_local_output}, format={self.format}, gradient={self.gradient})"
        )

    @abstractmethod
    def _placement(self, module: nn.Module, parameter: str) -> Placement:
        """How a parameter of the module is distributed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = next((layer for kind, layer in self.layers.items() if isinstance(module, kind)), None)
        what, kinds = f"{self.name} style", ", ".join(kind.__name__ for kind in self.layers)
        if layer is None or type(module).forward not in [kind.forward for kind in self.layers]:
            raise TypeError(f"{what}: a {type(module).__name__}, expected one of {kinds} with its own forward")
        if device_mesh.ndim != 1:
            raise ValueError(f"{what}: a mesh of {device_mesh.ndim} dimensions, expected one; pass mesh[name]")
        self._check(what, module)
        world_size = device_mesh.size()
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = self._placement(module, name)
            if isinstance(placement, Shard) and parameter.shape[placement.dim] % world_size:
                raise ValueError(
                    f"{what}: {parameter.shape[placement.dim]} elements along dimension {placement.dim} of {name} "
                    f"{tuple(parameter.shape)}, expected a multiple of {world_size}, one part for each rank"
                )
            shared = distribute_tensor(parameter.detach(), device_mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
        module.link = Link(  # type: ignore[assignment]
            name=self.name,
            format=self.format,
            gradient=self.gradient,
            group=device_mesh.get_group().group_name,
            rank=device_mesh.get_local_rank(),
            world_size=world_size,
            input_layout=self.input_layout,
            output_layout=self.output_layout,
            use_local_output=self.use_local_output,
        )
        module.__class__ = layer
        return module

    def _check(self, what: str, module: nn.Module) -> None:
        """Refuse layouts that the module has no exchange for."""


class ColwiseParallel(_Style):
    """torch's ColwiseParallel for nn.Linear and nn.Embedding: each rank has a part of the outputs.

    input_layouts: Replicate() (default), or for Linear Shard(d).
    output_layouts: Shard(-1) (default) or Replicate(). use_local_output: a Tensor, else a DTensor.
    format: of values, gradient: of gradients; None: as `format`. name: see `commq.functional.traffic`.
    Error of a layer: that of the exchanges above in each direction.
    Raises TypeError, ValueError for modules, layouts and lengths that it cannot take.
    """

    layers: ClassVar = {nn.Linear: ColwiseLinear, nn.Embedding: ColwiseEmbedding}

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        format: Format | str,
        gradient: Format | str | None = None,
        name: str = "colwise",
    ) -> None:
        super().__init__(
            input_layouts or Replicate(), output_layouts or Shard(-1), use_local_output, format, gradient, name
        )

    def _placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(1 if isinstance(module, nn.Embedding) else 0)

    def _check(self, what: str, module: nn.Module) -> None:
        takes = (Replicate,) if isinstance(module, nn.Embedding) else (Replicate, Shard)
        if not isinstance(self.input_layout, takes):
            raise ValueError(
                f"{what}: input_layouts={self.input_layout} of a {type(module).__name__}; see its docstring"
            )
        if self.output_layout not in (Shard(-1), Replicate()):
            raise ValueError(f"{what}: output_layouts={self.output_layout}, expected Shard(-1) or Replicate()")


class RowwiseParallel(_Style):
    """torch's RowwiseParallel for nn.Linear and nn.Embedding: each rank has a part of the inputs, or of the rows.

    input_layouts: of Linear Shard(-1) (default) or Replicate(); of Embedding the indices, always Replicate().
    output_layouts: Replicate() (default), or Shard(d) with d not the last dimension.
    All else as in ColwiseParallel.
    """

    layers: ClassVar = {nn.Linear: RowwiseLinear, nn.Embedding: RowwiseEmbedding}

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        format: Format | str,
        gradient: Format | str | None = None,
        name: str = "rowwise",
    ) -> None:
        super().__init__(
            input_layouts or Shard(-1), output_layouts or Replicate(), use_local_output, format, gradient, name
        )

    def _placement(self, module: nn.Module, parameter: str) -> Placement:
        if isinstance(module, nn.Embedding):
            return Shard(0)
        return Shard(1) if parameter == "weight" else Replicate()

    def _check(self, what: str, module: nn.Module) -> None:
        takes = (Replicate(),) if isinstance(module, nn.Embedding) else (Shard(-1), Replicate())
        if self.input_layout not in takes:
            raise ValueError(
                f"{what}: input_layouts={self.input_layout} of a {type(module).__name__}, expected {takes}"
            )
        if not isinstance(self.output_layout, Replicate | Shard) or self.output_layout == Shard(-1):
            raise ValueError(
                f"{what}: output_layouts={self.output_layout}, expected Replicate() or Shard(d), not the last"
            )
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ValueError(f"{what}: an Embedding with max_norm, which every rank would apply to its rows alone")


class SequenceParallel(_Style):
    """torch's SequenceParallel for nn.LayerNorm and nn.RMSNorm: each rank has a part of the sequence.

    Input and output are sharded along sequence_dim; parameters are whole on every rank, and their gradients are summed
    as fp32: they are short. The output is a Tensor by default; torch's is a DTensor. Modules without parameters need no
    style.
    """

    layers: ClassVar = {nn.LayerNorm: SequenceLayerNorm, nn.RMSNorm: SequenceRMSNorm}

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = True, name: str = "sequence") -> None:
        layout = Shard(sequence_dim)
        super().__init__(layout, layout, use_local_output, "fp32", None, name)

    def _placement(self, module: nn.Module, parameter: str) -> Placement:
        return Replicate()


@torch.no_grad()
def localize(module: nn.Module) -> nn.Module:
    """Replace the DTensor parameters of a parallelized module by their local parts: for DistributedDataParallel.

    Optimizers and checkpoints then see this rank's part alone. Returns the module.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                local: Tensor = parameter.to_local().clone()
                owner.register_parameter(name, nn.Parameter(local, requires_grad=parameter.requires_grad))
    return module
