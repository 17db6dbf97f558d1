# mypy: allow-untyped-defs, allow-incomplete-defs
"""The tiles of tiles.py in Triton: same signatures, same bytes.

    encode   `_ranges` of all tiles; `_choose` the narrow ones and number them; `_encode` reads x once more
    decode   `_number` the narrow tiles; `_decode`

Ranges and numbers are all that stands in memory between kernels: 8 bytes a tile. ranks: int32 (tiles + 1,), how many
narrow tiles come before each tile, and in the end all of them. Two kernels are one program each, which sees all tiles.
A tile of 64 elements is a row in registers; shape letters: G tiles of a program, E elements of a tile.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.tiles import TILE, TileLayout
from commq.codecs.triton_bits import (
    bits_float,
    float_bits,
    from_float,
    hadamard,
    load_tile,
    load_word,
    max_bits,
    pack,
    round_even,
    store_word,
    to_float,
    unpack,
)
from commq.codecs.triton_levels import load_threes, store_threes

_SCALARS = ["numel", "tiles", "wide", "narrow"]
_GROUP = 32
"""Tiles of a program that encodes or decodes."""
_CHUNK = 8192
"""Tiles that the programs that see all tiles have in registers at a time. They are small, to find a place beside the
model's kernels."""

# What tl.max, tl.min and tl.sum combine with; used directly, they work compiled and interpreted in one process.
_maximum, _minimum, _sum = tl.standard._elementwise_max, tl.standard._elementwise_min, tl.standard._sum_combine


@triton.jit
def _lanes(G: tl.constexpr):
    return tl.broadcast_to(tl.arange(0, 64)[None, :], [G, 64])


@triton.jit
def _swap(x_GE, lane_GE, pivot_G):
    """Element 0 and the pivot change places."""
    here_GE = lane_GE == pivot_G[:, None]
    bits_GE = float_bits(x_GE)
    first_G = tl.reduce(tl.where(lane_GE == 0, bits_GE, -2147483648), 1, _maximum)
    other_G = tl.reduce(tl.where(here_GE, bits_GE, -2147483648), 1, _maximum)
    swapped_GE = tl.where(here_GE, bits_float(first_G)[:, None], x_GE)
    return tl.where(lane_GE == 0, bits_float(other_G)[:, None], swapped_GE)


@triton.jit
def _load_tiles(x, numel, tau, G: tl.constexpr):
    """Of this program's tiles: y (G, E) as it will be encoded; lowest and highest of it, head, and marks (G,)."""
    lane_GE = _lanes(G)
    start = tl.program_id(0).to(tl.int64) * (G * 64)
    offsets_GE = tl.arange(0, G)[:, None] * 64 + lane_GE
    inside = tl.minimum(numel.to(tl.int64) - start, G * 64).to(tl.int32)
    if inside == G * 64:
        value_GE = tl.load(x + start + offsets_GE)
    else:
        value_GE = tl.load(x + start + tl.minimum(offsets_GE, inside - 1))
    x_GE = to_float(value_GE)
    marked_G = max_bits(x_GE) >= 0x7F800000
    x_GE = tl.where(marked_G[:, None], 0.0, x_GE)

    bits_GE = float_bits(x_GE) & 0x7FFFFFFF
    top_G = tl.reduce(bits_GE, 1, _maximum)
    pivot_G = tl.reduce(tl.where(bits_GE == top_G[:, None], lane_GE, -1), 1, _maximum)
    second_G = tl.reduce(tl.where(lane_GE == pivot_G[:, None], 0, bits_GE), 1, _maximum)
    top_G = bits_float(top_G)
    rotated_G = (top_G > bits_float(second_G) * tau) & (top_G < 1329227995784915872903807060280344576.0)
    pivot_G = tl.where(rotated_G, pivot_G, 0)
    rotated_GE = hadamard(_swap(x_GE, lane_GE, pivot_G) * 0.125, 64, G, 64)
    y_GE = tl.where(rotated_G[:, None], rotated_GE, x_GE)

    low_G = tl.reduce(y_GE, 1, _minimum)
    high_G = tl.reduce(y_GE, 1, _maximum)
    low_G = tl.where(low_G == 0, 0.0, low_G)  # never -0
    high_G = tl.where(high_G == 0, 0.0, high_G)
    return y_GE, low_G, high_G, pivot_G | (rotated_G.to(tl.int32) << 6), marked_G


@triton.jit(do_not_specialize=_SCALARS)
def _ranges(x, ranges, numel, tiles, tau, G: tl.constexpr):
    """The range of each tile, as the bits of a float32 that is 0 or more: they have the same order."""
    _, low_G, high_G, _, _ = _load_tiles(x, numel, tau, G)
    tile_G = tl.program_id(0) * G + tl.arange(0, G)
    tl.store(ranges + tile_G, float_bits(high_G * 0.5 - low_G * 0.5), mask=tile_G < tiles)


@triton.jit
def _load_ranges(ranges, start, tiles, CHUNK: tl.constexpr):
    """Those beyond the last tile are above all others."""
    inside = tl.minimum(tiles - start, CHUNK)
    return load_tile(ranges + start, tl.arange(0, CHUNK), inside, CHUNK, 0x7FFFFFFF)


@triton.jit
def _count_below(first, ranges, bound, tiles, CHUNK: tl.constexpr):
    """Ranges below a bound. first: the first chunk of them."""
    below = (first < bound).to(tl.int32)
    for start in range(CHUNK, tiles, CHUNK):
        below += (_load_ranges(ranges, start, tiles, CHUNK) < bound).to(tl.int32)
    return tl.reduce(below, 0, _sum)


@triton.jit(do_not_specialize=_SCALARS)
def _choose(ranges, ranks, tiles, narrow, CHUNK: tl.constexpr):
    """Number the `narrow` tiles of the least range, of equal ones the first. One program.

    They are those below `bound`, and the first `left` of those that are equal to it, which is found bit by bit.
    """
    first = _load_ranges(ranges, 0, tiles, CHUNK)
    bound, left, bit = 0, narrow, 1 << 30
    while (bit > 0) & (left > 0):
        above = narrow - _count_below(first, ranges, bound | bit, tiles, CHUNK)
        bound = tl.where(above >= 0, bound | bit, bound)
        left = tl.where(above >= 0, above, left)
        bit = bit >> 1
    tl.store(ranks, 0)
    below, equal = 0, 0
    for start in range(0, tiles, CHUNK):
        chunk = _load_ranges(ranges, start, tiles, CHUNK)
        tile = start + tl.arange(0, CHUNK)
        below_upto = below + tl.associative_scan((chunk < bound).to(tl.int32), 0, _sum)
        equal_upto = equal + tl.associative_scan((chunk == bound).to(tl.int32), 0, _sum)
        tl.store(ranks + 1 + tile, below_upto + tl.minimum(equal_upto, left), mask=tile < tiles)
        below = tl.reduce(below_upto, 0, _maximum)
        equal = tl.reduce(equal_upto, 0, _maximum)


@triton.jit(do_not_specialize=_SCALARS)
def _number(heads, ranks, tiles, CHUNK: tl.constexpr):
    """Number the tiles whose heads say that they are narrow. One program."""
    tl.store(ranks, 0)
    total = 0
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        head = tl.load(heads + tile, mask=tile < tiles, other=0)
        upto = total + tl.associative_scan((head >= 128).to(tl.int32), 0, _sum)
        tl.store(ranks + 1 + tile, upto, mask=tile < tiles)
        total = tl.reduce(upto, 0, _maximum)


@triton.jit
def _code_places(wire, ranks, narrow_G, rank_G, tile_G, tiles, wide):
    """Whether each tile's codes are among the wide ones, and where they begin.

    Tiles that say they are wide come first; all that stand in the first `wide` places have 4 bits.
    """
    place_G = tl.where(narrow_G, tiles - tl.load(ranks + tiles) + rank_G, tile_G - rank_G)
    past_G = tl.maximum(place_G - wide, 0).to(tl.int64)
    codes = wire + tiles.to(tl.int64) * 5
    return place_G < wide, codes + (place_G - past_G) * 32 + past_G * 24


@triton.jit(do_not_specialize=_SCALARS)
def _encode(x, ranks, wire, numel, tiles, wide, tau, G: tl.constexpr):
    """Reads x and the ranks, writes the wire."""
    y_GE, low_G, high_G, head_G, marked_G = _load_tiles(x, numel, tau, G)
    lane_G = tl.arange(0, G)
    tile_G = tl.program_id(0) * G + lane_G
    present_G = tile_G < tiles
    rank_G = tl.load(ranks + tile_G, mask=present_G, other=0)
    narrow_G = tl.load(ranks + 1 + tile_G, mask=present_G, other=0) > rank_G
    most_G = tl.where(narrow_G, 7.0, 15.0)

    low_bits_G = float_bits(low_G)
    magnitude_G = low_bits_G & 0x7FFFFFFF
    below_G = tl.minimum((magnitude_G + 0xFFFF) >> 16, 0x7F7F) | 0x8000
    zero_word_G = tl.where(low_bits_G < 0, below_G, magnitude_G >> 16)
    zero_G = bits_float(zero_word_G << 16)
    scale_G = tl.div_rn(high_G, most_G) - tl.div_rn(zero_G, most_G)
    scale_word_G = tl.minimum((float_bits(scale_G) + 0xFFFF) >> 16, 0x7F7F)
    half_G = bits_float(scale_word_G << 16) * 0.5
    some_GE = tl.broadcast_to((half_G > 0)[:, None], y_GE.shape)
    divisor_GE = tl.where(some_GE, half_G[:, None], 1.0)
    t_GE = tl.where(some_GE, tl.div_rn(y_GE * 0.5 - (zero_G * 0.5)[:, None], divisor_GE), 0.0)
    codes_GE = round_even(tl.minimum(tl.maximum(t_GE, 0.0), most_G[:, None])).to(tl.int32)

    tl.store(wire + tile_G, (head_G | (narrow_G.to(tl.int32) << 7)).to(tl.uint8), mask=present_G)
    sections = wire + tiles.to(tl.int64)
    store_word(sections, tile_G.to(tl.int64), tl.where(marked_G, 0x7FC0, scale_word_G), present_G, 2, False)
    store_word(sections, tiles + tile_G.to(tl.int64), zero_word_G, present_G, 2, False)
    is_wide_G, codes_G = _code_places(wire, ranks, narrow_G, rank_G, tile_G, tiles, wide)
    fours = codes_G[:, None] + tl.arange(0, 32)[None, :]
    tl.store(fours, pack(codes_GE, 4, G, 64), mask=(present_G & is_wide_G)[:, None])
    threes = (codes_G - lane_G * 24)[:, None]  # store_threes adds the number of the tile
    store_threes(threes, codes_GE, present_G & (is_wide_G == 0), G, 64)


@triton.jit(do_not_specialize=_SCALARS)
def _decode(wire, ranks, out, numel, tiles, wide, top, G: tl.constexpr):
    """Reads the wire and the ranks, writes out, at most `top`."""
    lane_GE = _lanes(G)
    lane_G = tl.arange(0, G)
    tile_G = tl.program_id(0) * G + lane_G
    present_G = tile_G < tiles
    head_G = tl.load(wire + tile_G, mask=present_G, other=0).to(tl.int32)
    sections = wire + tiles.to(tl.int64)
    scale_G = bits_float(load_word(sections, tile_G.to(tl.int64), present_G, 2, False) << 16)
    zero_G = bits_float(load_word(sections, tiles + tile_G.to(tl.int64), present_G, 2, False) << 16)
    rank_G = tl.load(ranks + tile_G, mask=present_G, other=0)
    is_wide_G, codes_G = _code_places(wire, ranks, head_G >= 128, rank_G, tile_G, tiles, wide)
    fours = codes_G[:, None] + tl.arange(0, 32)[None, :]
    codes_GE = unpack(tl.load(fours, mask=(present_G & is_wide_G)[:, None], other=0), 4, G, 64)
    threes = (codes_G - lane_G * 24)[:, None]  # load_threes adds the number of the tile
    codes_GE = codes_GE | load_threes(threes, present_G & (is_wide_G == 0), G, 64)

    y_GE = codes_GE.to(tl.float32) * scale_G[:, None]
    y_GE = tl.where(y_GE > 3.4028234663852886e38, 3.4028234663852886e38, y_GE) + zero_G[:, None]
    x_GE = _swap(hadamard(y_GE * 0.125, 64, G, 64), lane_GE, head_G & 63)
    x_GE = tl.where(((head_G & 64) != 0)[:, None], x_GE, y_GE)
    x_GE = tl.where(x_GE > top, top, tl.where(x_GE < -top, -top, x_GE))
    start = tl.program_id(0).to(tl.int64) * (G * 64)
    offsets_GE = lane_G[:, None] * 64 + lane_GE
    inside = tl.minimum(numel.to(tl.int64) - start, G * 64).to(tl.int32)
    value_GE = from_float(x_GE, out.dtype.element_ty)
    if inside == G * 64:
        tl.store(out + start + offsets_GE, value_GE)
    else:
        tl.store(out + start + offsets_GE, value_GE, mask=offsets_GE < inside)


def encode_tiles(x_N: Tensor, wire_S: Tensor, layout: TileLayout, *, tau: float = 2.0) -> None:
    """See tiles.encode_tiles."""
    if not layout.numel:
        return
    ranges_T = torch.empty(layout.tiles, dtype=torch.int32, device=x_N.device)
    ranks = _ranks(layout, x_N.device)
    x, sizes, grid = _pointer(x_N), (layout.numel, layout.tiles), _grid(layout)
    with _device(x_N):
        _ranges[grid](x, ranges_T, *sizes, float(tau), G=_GROUP, enable_fp_fusion=False)
        _choose[(1,)](ranges_T, ranks, layout.tiles, layout.narrow, **_all_tiles(layout))
        _encode[grid](x, ranks, wire_S, *sizes, layout.wide, float(tau), G=_GROUP, enable_fp_fusion=False)


def decode_tiles(wire_S: Tensor, layout: TileLayout, out_N: Tensor) -> None:
    """See tiles.decode_tiles."""
    if not layout.numel:
        return
    ranks = _ranks(layout, out_N.device)
    top = min(torch.finfo(out_N.dtype).max, torch.finfo(torch.bfloat16).max)
    with _device(out_N):
        _number[(1,)](wire_S, ranks, layout.tiles, **_all_tiles(layout))
        _decode[_grid(layout)](
            wire_S, ranks, _pointer(out_N), layout.numel, layout.tiles, layout.wide, top,
            G=_GROUP, enable_fp_fusion=False,
        )  # fmt: skip


def _ranks(layout: TileLayout, device: torch.device) -> Tensor:
    return torch.empty(layout.tiles + 1, dtype=torch.int32, device=device)


def _grid(layout: TileLayout) -> tuple[int]:
    return (triton.cdiv(layout.numel, _GROUP * TILE),)


def _all_tiles(layout: TileLayout) -> dict[str, int]:
    """Options of the programs that see all tiles."""
    chunk = min(max(triton.next_power_of_2(layout.tiles), 1024), _CHUNK)
    return {"CHUNK": chunk, "num_warps": max(chunk // 1024, 1), "enable_fp_fusion": False}


def _pointer(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _device(x: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
