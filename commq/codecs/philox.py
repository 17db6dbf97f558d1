"""Random bits from a counter: Philox 4x32-10.

The same (seed, stream, step, element) gives the same bits on every device and in every implementation; nothing
here reads a clock or a global generator. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), the constants and the ten rounds of Philox-4x32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter. counter: four int64 tensors of one shape, values in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2**64, so both halves of the unsigned product are still right.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def random_u16(block_ids_G: Tensor, block: int, *, seed: int, step: int | Tensor, stream: int) -> Tensor:
    """16 random bits for each element of G blocks: int64 (G, block), values in [0, 2**16).

    block_ids_G: int64, the position of each block in a global numbering that no bucket layout changes.
    step: a number, or an int64 tensor of one (a compiled graph need not know it).
    Element e = block_id * block + i takes half-word e % 8 (low half first) of counter
    (e // 8 mod 2**32, e // 8 >> 32, step mod 2**32, step >> 32) under key (seed, stream).
    """
    lanes = torch.arange(block // 8, device=block_ids_G.device)
    index = block_ids_G[:, None] * (block // 8) + lanes
    constant = torch.zeros_like(index) + step
    words = philox((index & _MASK, index >> 32, constant & _MASK, constant >> 32), (seed, stream))
    word = torch.stack(words, dim=-1)  # (G, block / 8, 4)
    return torch.stack((word & 0xFFFF, word >> 16), dim=-1).reshape(len(block_ids_G), block)


def random_signs(count: int, *, seed: int, step: int | Tensor, stream: int, device: torch.device) -> Tensor:
    """`count` fair signs, float32 +1 or -1: bit i % 128 of counter (i // 128, 0, step, step >> 32)."""
    index = torch.arange(-(-count // 128), device=device)
    constant = torch.zeros_like(index) + step
    words = philox((index, torch.zeros_like(index), constant & _MASK, constant >> 32), (seed, stream))
    word = torch.stack(words, dim=-1)  # (count / 128, 4)
    bits = (word[..., None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).reshape(-1)[:count].to(torch.float32)
