"""Tiles: 64 elements as codes of 4 or 3 bits, with a scale, a zero point, and a rotation where one element stands out.

    one element dominates   largest |x| > tau * second largest: swap it to the front, then Hadamard / 8. It becomes the
                            same offset of all 64 (the first column of H is ones), which the zero point takes away
    zero, scale             the smallest element rounded down, and (largest - zero) / (2**bits - 1) rounded up, in bf16
    code                    (x - zero) / scale, rounded to nearest even;  x_hat = zero + code * scale
    bits                    3 for `narrow_share` of all tiles, those of the least range (largest - smallest); else 4

A wire of T tiles: | heads: T | scales: bf16 T | zeros: bf16 T | wide codes | narrow codes |, little-endian. A head has
the pivot's place in its 6 low bits, then a bit for "rotated" and one for "narrow". 4.425 bits an element in all.
Tiles are runs in memory order: those of one token where its width is a multiple of 64. triton_pivots.py gives the
same bytes; `ops.tile_implementation` chooses.

Error: with step = the tile's scale, at most `tile_steps` says: step / 2 of each element; of a rotated tile that bound
holds for the 2-norm, 4 * step. A tile with a number that is not finite decodes to NaN. Zeros stay zeros.
Source: TAH-Quant (arXiv 2506.01352): tiles, 3 and 4 bits, pivot swap, 16-bit scale and zero. It chooses narrow tiles by
entropy; those of the least range lose least (relative squared error of normal numbers 0.0120; by entropy 0.0133).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commq.codecs.rotation import hadamard
from commq.codecs.wire import pack, unpack

TILE = 64
WIDE, NARROW = 4, 3
_ROTATE_BELOW = 2.0**120
"""Larger ones are not rotated: their sum could overflow."""
_ROTATED, _NARROW = 64, 128
_TOP = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class TileLayout:
    """Where everything stands on the wire, for a tensor of `numel` elements."""

    numel: int
    narrow_share: float = 0.2
    """Part of the tiles that has 3 bits; rounded down to whole tiles."""

    @property
    def tiles(self) -> int:
        return -(-self.numel // TILE)

    @property
    def narrow(self) -> int:
        """Tiles of 3 bits."""
        return int(self.tiles * self.narrow_share)

    @property
    def wide(self) -> int:
        return self.tiles - self.narrow

    @property
    def nbytes(self) -> int:
        return 5 * self.tiles + TILE // 8 * (WIDE * self.wide + NARROW * self.narrow)

    def sections(self, wire_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """heads (T,), scales (T, 2), zeros (T, 2), wide codes (., 32), narrow codes (., 24): views, uint8."""
        sizes = [self.tiles, 2 * self.tiles, 2 * self.tiles, self.wide * TILE * WIDE // 8]
        heads, scales, zeros, wide, narrow = wire_S[: self.nbytes].split([*sizes, self.nbytes - sum(sizes)])
        return heads, scales.view(-1, 2), zeros.view(-1, 2), wide.view(-1, 32), narrow.view(-1, 24)


def encode_tiles(x_N: Tensor, wire_S: Tensor, layout: TileLayout, *, tau: float = 2.0) -> None:
    """Write all layout.nbytes of `wire_S` (uint8).

    x_N: float32, bfloat16 or float16, 1-D, of layout.numel elements. tau: how many times as large as the second one
    an element must be to have its tile rotated, 1 or more. Nothing waits for the device.
    """
    if not layout.numel:
        return
    padding = x_N[-1:].expand(layout.tiles * TILE - layout.numel)  # changes neither range nor zero
    x_TE = torch.cat((x_N, padding)).to(torch.float32).view(-1, TILE)
    marked_T = ~x_TE.isfinite().all(dim=-1)
    x_TE = x_TE.masked_fill(marked_T[:, None], 0.0)
    size_TE = x_TE.abs()
    top_T1, place_T1 = size_TE.max(dim=-1, keepdim=True)
    second_T1 = size_TE.scatter(1, place_T1, 0.0).amax(dim=-1, keepdim=True)
    rotated_T = ((top_T1 > tau * second_T1) & (top_T1 < _ROTATE_BELOW))[:, 0]
    pivot_T = torch.where(rotated_T, place_T1[:, 0], 0)
    y_TE = torch.where(rotated_T[:, None], _rotate(_swap(x_TE, pivot_T)), x_TE)

    low_T, high_T = y_TE.aminmax(dim=-1)
    low_T, high_T = low_T + 0.0, high_T + 0.0  # never -0, whichever zero was found first
    order_T = (high_T * 0.5 - low_T * 0.5).argsort(stable=True)  # halves: huge numbers must not overflow
    narrow_T = torch.zeros_like(marked_T).index_fill(0, order_T[: layout.narrow], True)
    most_T = torch.where(narrow_T, 2.0**NARROW - 1, 2.0**WIDE - 1)
    zero_T = _round_bf16(low_T, up=False)
    scale_T = _round_bf16(high_T / most_T - zero_T / most_T, up=True)
    half_T = (scale_T * 0.5)[:, None]
    t_TE = torch.where(half_T > 0, (y_TE * 0.5 - (zero_T * 0.5)[:, None]) / half_T, 0.0)
    codes_TE = torch.minimum(t_TE.round().clamp(min=0), most_T[:, None]).to(torch.uint8)

    heads, scales_T2, zeros_T2, wide, narrow = layout.sections(wire_S)
    heads.copy_(pivot_T + _ROTATED * rotated_T + _NARROW * narrow_T)
    scales_T2.copy_(_bytes(scale_T, marked_T))
    zeros_T2.copy_(_bytes(zero_T))
    order_T = _wide_first(narrow_T)
    wide.copy_(pack(codes_TE[order_T[: layout.wide]], WIDE))
    narrow.copy_(pack(codes_TE[order_T[layout.wide :]], NARROW))


def decode_tiles(wire_S: Tensor, layout: TileLayout, out_N: Tensor) -> None:
    """Decode into out_N (float32, bfloat16 or float16, layout.numel elements). Any bytes decode, within bounds."""
    if not layout.numel:
        return
    heads, scales_T2, zeros_T2, wide, narrow = layout.sections(wire_S)
    codes_TE = torch.empty(layout.tiles, TILE, dtype=torch.uint8, device=wire_S.device)
    order_T = _wide_first(heads >= _NARROW)
    codes_TE[order_T[: layout.wide]] = unpack(wide, WIDE)
    codes_TE[order_T[layout.wide :]] = unpack(narrow, NARROW)
    scale_T1, zero_T1 = _floats(scales_T2), _floats(zeros_T2)
    y_TE = (codes_TE.to(torch.float32) * scale_T1).clamp(max=torch.finfo(torch.float32).max) + zero_T1
    rotated_T = (heads & _ROTATED) != 0
    x_TE = torch.where(rotated_T[:, None], _swap(_rotate(y_TE), (heads & 63).to(torch.int64)), y_TE)
    top = min(torch.finfo(out_N.dtype).max, _TOP)
    out_N.copy_(x_TE.view(-1)[: layout.numel].clamp(-top, top))


def tile_steps(wire_S: Tensor, layout: TileLayout) -> tuple[Tensor, Tensor]:
    """Of each tile: its step (its scale), and whether it is rotated: the error's bound is a function of these."""
    heads, scales_T2, _, _, _ = layout.sections(wire_S)
    return _floats(scales_T2)[:, 0], (heads & _ROTATED) != 0


def _wide_first(narrow_T: Tensor) -> Tensor:
    """Tiles in the order in which their codes stand on the wire."""
    return narrow_T.to(torch.uint8).argsort(stable=True)


def _rotate(x_TE: Tensor) -> Tensor:
    """H x / 8: its own inverse."""
    return hadamard(x_TE * 0.125, TILE)


def _swap(x_TE: Tensor, pivot_T: Tensor) -> Tensor:
    """Element 0 and the pivot change places; pivot 0 leaves a tile as it is."""
    place_TE = torch.arange(TILE, device=x_TE.device).expand(x_TE.shape)
    pivot_T1 = pivot_T[:, None]
    source_TE = torch.where(place_TE == pivot_T1, 0, place_TE)
    source_TE = torch.where(place_TE == 0, pivot_T1, source_TE)
    return x_TE.gather(1, source_TE)


def _round_bf16(x_T: Tensor, *, up: bool) -> Tensor:
    """The nearest float32 that is a bf16 and not below (`up`) or not above x; never an infinity."""
    near_T = x_T.to(torch.bfloat16)
    bits_T = near_T.view(torch.int16).to(torch.int32)
    wrong_T = near_T.to(torch.float32) < x_T if up else near_T.to(torch.float32) > x_T
    # One step away from zero, or towards it, is one in the bits of the magnitude.
    outward_T = torch.where((near_T >= 0) == up, 1, -1)
    moved_T = (bits_T + outward_T).to(torch.int16).view(torch.bfloat16)
    zero_T = torch.full_like(near_T, 2.0**-133 if up else -(2.0**-133))
    moved_T = torch.where(near_T == 0, zero_T, moved_T)
    return torch.where(wrong_T, moved_T, near_T).clamp(-_TOP, _TOP).to(torch.float32)


def _bytes(x_T: Tensor, marked_T: Tensor | None = None) -> Tensor:
    """uint8 (T, 2); the same NaN on every device where marked."""
    bits_T = x_T.to(torch.bfloat16).view(torch.int16)
    if marked_T is not None:
        bits_T = bits_T.masked_fill(marked_T, 0x7FC0)
    return bits_T.view(torch.uint8).view(-1, 2)


def _floats(bytes_T2: Tensor) -> Tensor:
    """float32 (T, 1); a copy, since bf16 cannot be viewed at every address."""
    return bytes_T2.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).to(torch.float32)
