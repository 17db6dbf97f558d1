"""Other libraries' compressed all-reduces as DDP hooks, for bench/step.py; left out where they are not installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.futures import Future

Hook = Callable[..., Future[Tensor]]

_ROW = 2048
"""Elements that share a scale, of those that keep either library's kernels fast."""


def peer_hooks() -> Iterator[tuple[str, Hook]]:
    if importlib.util.find_spec("torchft") is not None:
        yield "torchft fp8", _torchft
    if importlib.util.find_spec("deepspeed") is not None:
        yield "DeepSpeed int4", _deepspeed


def _torchft(state: Any, bucket: Any) -> Future[Tensor]:
    """Its two-shot all-reduce on rows of 2048, on a side stream. fp8 e4m3 on sm 90, int8 below."""
    from torchft.collectives import allreduce_quantized

    def exchange(buffer: Tensor, side: torch.cuda.Stream) -> None:
        rows = F.pad(buffer, (0, -buffer.numel() % _ROW)).view(-1, _ROW)
        allreduce_quantized([rows], dist.ReduceOp(dist.ReduceOp.AVG), dist.group.WORLD, side)
        buffer.copy_(rows.view(-1)[: buffer.numel()])

    return _beside(bucket.buffer(), exchange)


def _deepspeed(state: Any, bucket: Any) -> Future[Tensor]:
    """ZeRO++'s int4 kernels, float16 -> int4: its all-to-all and reduction (qgZ, one hop), and an all-gather."""
    kernels = _deepspeed_kernels()

    def exchange(buffer: Tensor, side: torch.cuda.Stream) -> None:
        world_size = dist.get_world_size()
        x = F.pad(buffer / world_size, (0, -buffer.numel() % (_ROW * world_size))).half()
        groups = x.numel() // _ROW
        parts = kernels.swizzle_quant(x, groups, 4, kernels.Symmetric, 1, 1, world_size)
        arrived = [torch.empty_like(part) for part in parts]
        for into, part in zip(arrived, parts, strict=True):
            dist.all_to_all_single(into, part)
        own = kernels.quantized_reduction(*arrived, groups, groups // world_size, 4, kernels.Symmetric, world_size)
        gathered = [part.new_empty(world_size * part.numel()) for part in own]
        for into, part in zip(gathered, own, strict=True):
            dist.all_gather_into_tensor(into, part.view(-1))
        y = kernels.dequantize(*gathered, groups, 4, kernels.Symmetric)
        buffer.copy_(y.view(-1)[: buffer.numel()])

    return _beside(bucket.buffer(), exchange)


@functools.cache
def _deepspeed_kernels() -> Any:
    return importlib.import_module("deepspeed.ops.op_builder").QuantizerBuilder().load()


def _beside(buffer: Tensor, exchange: Callable[[Tensor, torch.cuda.Stream], None]) -> Future[Tensor]:
    """Run an exchange of a bucket, in place, on a side stream."""
    side = _side_stream(buffer.device)
    side.wait_stream(torch.cuda.current_stream())
    future: Future[Tensor] = Future(devices=[buffer.device])
    with torch.cuda.stream(side):
        exchange(buffer, side)
        future.set_result(buffer)
    return future


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
