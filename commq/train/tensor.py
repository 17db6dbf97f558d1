"""The trainer of `--tensor-parallel N`: N neighbours share the attention and the MLP of every block.

Ranks are a table of W / N rows and N columns. The ranks of a row get the same sequences and hold parts of the blocks;
the ranks of a column hold the same parts and average their gradients by the recipe, as DDP does. Every column averages
those of embedding, norms and head, too: they stay the same bits, for all columns do the same with the same gradients.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.optim import Optimizer

import commq
from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel, localize
from commq.collectives.hosts import Hosts, find_hosts
from commq.collectives.transport import C10d
from commq.train.config import Config
from commq.train.data import Corpus
from commq.train.model import GPT, Block
from commq.train.parts import CountingHandle, PartsTrainer
from commq.train.ranks import Ranks


class TensorTrainer(PartsTrainer):
    """One rank of a run whose blocks are shared by `config.tensor_parallel` ranks; embedding and head are not."""

    def __init__(self, config: Config, recipe: commq.Recipe, corpus: Corpus, ranks: Ranks) -> None:
        """ValueError, the same on every rank: ranks that cannot be divided, or columns that would drift apart."""
        columns = config.tensor_parallel
        if ranks.world_size % columns:
            raise ValueError(
                f"--tensor-parallel {columns} with {ranks.world_size} processes; choose a divisor of {ranks.world_size}"
            )
        rows = ranks.world_size // columns
        table = torch.arange(ranks.world_size).view(rows, columns)
        _check_same(recipe, table.t().tolist())
        backend = dist.get_backend(ranks.group)
        row = _own_group(table.tolist(), backend)
        column = _own_group(table.t().tolist(), backend)
        self._mesh = DeviceMesh.from_group(row, ranks.device.type)
        of_column = replace(ranks, rank=ranks.rank // columns, world_size=rows, group=column)
        super().__init__(config, recipe, corpus, of_column)

    def _attach(self, model: nn.Module, recipe: commq.Recipe) -> tuple[Any, Any, Optimizer]:
        assert isinstance(model, GPT)
        share_blocks(model, self._mesh, self.config.activations)
        own = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        localize(model)
        ddp, handle, optimizer = super()._attach(model, recipe)
        self.own = [model.get_parameter(name) for name in own]
        self.own_group = self._mesh.get_group()
        return ddp, CountingHandle(handle, self._mesh), optimizer


@torch.no_grad()
def share_blocks(model: GPT, mesh: DeviceMesh, format: str) -> None:
    """Make attention and MLP of every block parallel over a mesh of one dimension."""
    columns = mesh.size()
    into, out_of = ColwiseParallel(format=format), RowwiseParallel(format=format)
    plan: dict[str, ParallelStyle] = {"attention.qkv": into, "attention.out": out_of, "mlp.0": into, "mlp.2": out_of}
    for block in model.blocks:
        assert isinstance(block, Block)
        attention = block.attention
        attention.heads //= columns
        # Rows of queries, keys and values follow each other; a rank needs the heads' rows of all three together.
        weight = attention.qkv.weight
        weight.copy_(weight.unflatten(0, (3, columns, -1)).transpose(0, 1).flatten(0, 2))
        parallelize_module(block, mesh, plan)


def _check_same(recipe: commq.Recipe, columns: list[list[int]]) -> None:
    """ValueError if columns may treat the parameters that all of them hold differently. All ranks call it."""
    what = f"--tensor-parallel {len(columns)} with recipe {recipe.name!r}"
    why = "embedding, norms and head, which every column averages, would drift apart"
    if recipe.adapt is not None or recipe.schedule == "auto":
        how = "schedule='auto'" if recipe.adapt is None else f"adapt={recipe.adapt}"
        raise ValueError(f"{what}, which has {how}: columns of ranks decide by what each measures, and {why}")
    if recipe.schedule != "two_hop" and not recipe.secondary:
        return
    hosts = find_hosts(C10d())
    if len({Hosts.of([hosts.host_of[rank] for rank in column]) for column in columns}) > 1:
        raise ValueError(
            f"{what}, which travels inside hosts first, and hosts of ranks {hosts.members}: the columns {columns} are "
            f"spread over hosts in different ways, and {why}; start a multiple of {len(columns)} processes on each host"
        )


def _own_group(lists: list[list[int]], backend: str) -> dist.ProcessGroup:
    """This rank's group of those that divide all ranks."""
    groups = [dist.new_group(ranks, backend=backend) for ranks in lists]
    return next(group for group, ranks in zip(groups, lists, strict=True) if dist.get_rank() in ranks)
