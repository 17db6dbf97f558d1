"""Inputs that tiles get wrong, and whether an implementation of tiles gives the bytes of tiles.py."""

import torch

from commq.codecs.tiles import TILE, decode_tiles, encode_tiles
from numerics import nasty_inputs


def crosses_alike(codec, x, layout, device="cpu", **options):
    """The codec on `device` gives the bytes of tiles.py on the CPU, and decodes them to the same numbers."""
    wires = [torch.empty(layout.nbytes, dtype=torch.uint8).fill_(0xA5) for _ in range(2)]
    wires[1] = wires[1].to(device)
    encode_tiles(x, wires[0], layout, **options)
    codec.encode_tiles(x.to(device), wires[1], layout, **options)
    assert torch.equal(wires[0], wires[1].cpu())
    decodes_alike(codec, wires[0], layout, x.dtype, device)


def decodes_alike(codec, wire, layout, dtype, device="cpu"):
    one, other = torch.empty(layout.numel, dtype=dtype), torch.empty(layout.numel, dtype=dtype, device=device)
    decode_tiles(wire, layout, one)
    codec.decode_tiles(wire.to(device), layout, other)
    other = other.cpu()
    assert torch.equal(one.isnan(), other.isnan())  # arithmetic on a NaN gives any NaN
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(one.nan_to_num(nan=7.0).view(bits), other.nan_to_num(nan=7.0).view(bits))


def outliers(numel, generator):
    """One element in 50 is large, and one huge: most tiles are rotated, some have two outliers, one is too large."""
    x = torch.randn(numel, generator=generator)
    large = torch.rand(numel, generator=generator) < 0.02
    return torch.where(large, 50.0 * x, x).index_fill(0, torch.tensor([70]), 2.0**120)


def harder_inputs():
    """Those of `nasty_inputs`, and what is hard for tiles alone: ties between ranges, pivots and zeros."""
    generator = torch.Generator().manual_seed(4)
    inputs = nasty_inputs() | {f"outliers {numel}": outliers(numel, generator) for numel in (640, 3333)}
    inputs["equal ranges"] = torch.randn(TILE, generator=generator).repeat(40)[:-9]
    inputs["two pivots"] = torch.zeros(TILE * 3).index_fill(0, torch.tensor([5, 9, 64, 127, 130]), -3.0)
    zeros = torch.zeros(TILE).index_fill(0, torch.tensor([3, 60]), -0.0)
    inputs["both zeros"] = torch.cat((zeros, zeros.flip(0), -zeros, zeros.index_fill(0, torch.tensor([1]), 1.0)))
    inputs["from the lowest number to the highest"] = inputs["equal ranges"].sign() * torch.finfo(torch.float32).max
    return inputs
