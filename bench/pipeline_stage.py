"""What bench/pipeline.py times: one stage of a GPT-2, and the ways its boundaries travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

import commq
from commq.attach.crossing import Way
from commq.attach.pipeline import PipelineStage
from commq.codecs.formats import get_format
from gpt2 import Block, GPT2Config

MODELS = {
    "gpt2": GPT2Config(layers=12, dim=768, heads=12, vocabulary=25129),
    "tiny": GPT2Config(layers=4, dim=64, heads=2, vocabulary=1009, context=64),
}
"""Embedding and output matrix are on different stages, so they are two, each of half the words: 124 million in all."""
BASELINE, PLAIN = "no communication", "bf16"


class Stage(nn.Module):
    """A run of blocks; the first stage embeds, the last one has the logits. Boundaries are bfloat16 on CUDA."""

    def __init__(self, config: GPT2Config, index: int, count: int) -> None:
        super().__init__()
        first, last = index == 0, index == count - 1
        mine = range(index * config.layers // count, (index + 1) * config.layers // count)
        self.tokens = nn.Embedding(config.vocabulary, config.dim) if first else None
        self.positions = nn.Embedding(config.context, config.dim) if first else None
        self.blocks = nn.ModuleList(Block(config) for _ in mine)
        self.norm = nn.LayerNorm(config.dim) if last else None
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False) if last else None
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 (B, T) for the first stage, else (B, T, D). The last returns logits (B, T, V)."""
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        x_BTD = x.float()
        for block in self.blocks:
            x_BTD = block(x_BTD)
        if self.head is not None and self.norm is not None:
            return self.head(self.norm(x_BTD))
        return x_BTD.bfloat16() if x_BTD.device.type == "cuda" else x_BTD


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


class SilentStage(pipelining.PipelineStage):
    """Computes on whatever its buffers hold: what no boundary can beat."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        for info in self.args_recv_info[fwd_chunk_id]:
            if getattr(info, "buffer", None) is not None:
                info.buffer.detach().zero_()
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        for operation in super().get_bwd_recv_ops(bwd_chunk_id):
            operation.tensor.detach().zero_()
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        super().get_bwd_send_ops(bwd_chunk_id)
        return []


Make = Callable[[nn.Module, int, int, torch.device], Any]


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    make: Make
    detail: str = ""
    names_samples: bool = False


def encoded(name: str, forward: Way | str, backward: Way | str, **options: Any) -> Method:
    make = partial(PipelineStage, forward=forward, backward=backward, **options)
    named = getattr(forward, "names_samples", False)
    return Method(name, make, f"{forward} forward, {backward} backward", named)


def methods(samples: int) -> Iterator[Method]:
    """What costs nothing first. samples: those of all batches."""
    yield Method(BASELINE, SilentStage, "stages compute, nothing travels")
    yield Method("torch", pipelining.PipelineStage, "torch's own stage: the tensors as they are")
    yield encoded("fp32", "fp32", "fp32")
    yield encoded(PLAIN, "bf16", "bf16")
    yield encoded("ahead 0: bf16", "bf16", "bf16", ahead=0)
    yield encoded("int8 / int8", "int8", "int8")
    int4 = commq.Direct(get_format("int4", scale="bf16"))
    int8 = commq.Direct(get_format("int8", scale="bf16"))
    yield encoded("int4 / int8", int4, int8)
    yield encoded("ahead 0: int4 / int8", int4, int8, ahead=0)
    yield encoded("int4 / int4", int4, int4)
    yield encoded("tiles / int8", "tiles", int8)
    yield encoded("tiles / tiles", "tiles", "tiles")
    for bits in ("int4", "int2"):
        fmt = get_format(bits, scale="bf16")
        way = commq.Differences(samples=samples, format=fmt, cache="device")
        yield encoded(f"differences {bits} / int8", way, int8)
