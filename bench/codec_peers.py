"""Other libraries' quantization kernels, for the table of bench/codecs.py; left out where not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch

from codec_calls import RANKS
from timing import Build

Peer = tuple[str, str, int, Build]
"""Library and kernel, family, bytes that must move, and what builds the call."""


def peers(numel: int) -> Iterator[Peer]:
    """Kernels of the libraries that are installed, on a bucket of `numel` elements."""
    for name, kernels in (("deepspeed", _deepspeed), ("torchft", _torchft), ("bitsandbytes", _bitsandbytes)):
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed, left out")
            continue
        try:
            yield from kernels(numel)
        except Exception as error:  # a library of another version must not end the run
            print(f"{name}: left out, {type(error).__name__}: {error}")


def _deepspeed(numel: int) -> Iterator[Peer]:
    """ZeRO++'s kernels: float16 -> int4, one scale per group; and the fused reduction of 8 messages."""
    kernels = importlib.import_module("deepspeed.ops.op_builder").QuantizerBuilder().load()
    for block in (128, 512, 2048):
        groups = numel // block

        def encode(groups: int = groups) -> Callable[[], object]:
            x = torch.randn(numel, device="cuda", dtype=torch.float16)
            return lambda: kernels.swizzle_quant(x, groups, 4, kernels.Symmetric, 1, 1, RANKS)

        yield f"deepspeed swizzle_quant int4/{block}", "encode", 2 * numel + numel // 2 + 4 * groups, encode

        def reduce(groups: int = groups) -> Callable[[], object]:
            x = torch.randn(numel, device="cuda", dtype=torch.float16)
            codes, scales = kernels.swizzle_quant(x, groups, 4, kernels.Symmetric, 1, 1, RANKS)
            return lambda: kernels.quantized_reduction(
                codes, scales, groups, groups // RANKS, 4, kernels.Symmetric, RANKS
            )

        moved = (numel // 2 + 4 * groups) * (RANKS + 1) // RANKS
        yield f"deepspeed quantized_reduction int4/{block}", "decode_sum_encode", moved, reduce


def _torchft(numel: int) -> Iterator[Peer]:
    """fp8 codes of rows of 2048 bfloat16, each with a float32 scale."""
    quantization = importlib.import_module("torchft.quantization")
    row = 2048
    codes = numel + numel // row * 4

    def inputs() -> list[torch.Tensor]:
        return [torch.randn(numel // row, row, device="cuda", dtype=torch.bfloat16)]

    def encode() -> Callable[[], object]:
        x = inputs()
        return lambda: quantization.fused_quantize_into_fp8(x, RANKS)

    def reduce() -> Callable[[], object]:
        x = inputs()
        wire = quantization.fused_quantize_into_fp8(x, RANKS)
        return lambda: quantization.fused_reduce_fp8(x, wire, RANKS, 0)

    def decode() -> Callable[[], object]:
        x = inputs()
        wire = quantization.fused_quantize_into_fp8(x, RANKS)
        return lambda: quantization.fused_dequantize_from_fp8(x, wire, RANKS)

    yield "torchft fused_quantize fp8", "encode", 2 * numel + codes, encode
    yield "torchft fused_reduce fp8", "decode_sum_encode", codes * (RANKS + 1) // RANKS, reduce
    yield "torchft fused_dequantize fp8", "decode", 2 * numel + codes, decode


def _bitsandbytes(numel: int) -> Iterator[Peer]:
    functional = importlib.import_module("bitsandbytes.functional")

    def x() -> torch.Tensor:
        return torch.randn(numel, device="cuda", dtype=torch.bfloat16)

    def encode4() -> Callable[[], object]:
        values = x()
        return lambda: functional.quantize_4bit(values, blocksize=128, quant_type="fp4")

    def decode4() -> Callable[[], object]:
        codes, state = functional.quantize_4bit(x(), blocksize=128, quant_type="fp4")
        return lambda: functional.dequantize_4bit(codes, state)

    def encode8() -> Callable[[], object]:
        values = x()
        return lambda: functional.quantize_blockwise(values, blocksize=256)

    yield "bitsandbytes quantize_4bit/128", "encode", 2 * numel + numel // 2 + numel // 32, encode4
    yield "bitsandbytes dequantize_4bit/128", "decode", 2 * numel + numel // 2 + numel // 32, decode4
    yield "bitsandbytes quantize_blockwise/256", "encode", 3 * numel + numel // 64, encode8
