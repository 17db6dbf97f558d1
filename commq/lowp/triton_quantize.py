# mypy: allow-untyped-defs, allow-incomplete-defs
"""`quantized` of one operand in one kernel: rotation, scales, codes and their values, in registers.

A program handles G tiles of TH x TW, one below the other, which are G blocks of B = TH * TW elements in the order that
random bits are counted in. What one scale serves more than a tile for is found first: the largest number of rows and of
whole operands by torch, that of nvfp4's tiles by a kernel of the same shape. The input is read with its strides; tiles
are wide enough that both a matrix and its transpose are read in whole sectors. bfloat16 is passed as int16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.triton_bits import (
    _maximum,
    bits_float,
    block_offsets,
    element_offsets,
    float_bits,
    hadamard,
    max_bits,
    random_words,
    to_float,
)
from commq.codecs.triton_blocks import decode_codes, decode_scales, encode_codes, scale_patterns, tile_format
from commq.lowp.operand import Operand
from commq.lowp.triton_random import load_step

TILES, ROW, ONE = 0, 1, 2
"""Whose scale it is: a tile's in registers, a row's, or the whole operand's."""
_PIECE = 2048
_LARGEST_TILE = 128 * 128
_SCALARS = ["seed", "stream", "signs_stream"]


@triton.jit
def _signs(seed, stream, step_low, step_high, SIZE: tl.constexpr):
    """`SIZE` signs of a rotation (philox.random_signs): bit i % 128 of counter i // 128."""
    lane = tl.arange(0, SIZE)
    w0, w1, w2, w3 = random_words((lane // 128).to(tl.int64), seed, stream, step_low, step_high)
    word = tl.where((lane & 64) == 0, tl.where((lane & 32) == 0, w0, w1), tl.where((lane & 32) == 0, w2, w3))
    return 1.0 - 2.0 * ((word >> (lane & 31).to(tl.uint32)) & 1).to(tl.int32).to(tl.float32)


@triton.jit
def _piece(
    x, rows, columns, width, row_stride, column_stride, seed, signs_stream, step_low, step_high,
    ROTATION: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The piece of this program, rotated: float32 (H, W), its rows and its columns.

    width: columns of the output, which are whole runs of a rotation.
    """
    across = (width + W - 1) // W
    r = tl.program_id(0) // across * H + tl.arange(0, H)
    c = tl.program_id(0) % across * W + tl.arange(0, W)
    places = r.to(tl.int64)[:, None] * row_stride + c.to(tl.int64)[None, :] * column_stride
    h = to_float(tl.load(x + places, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0))
    if ROTATION:
        if SIGNS:
            sign = _signs(seed, signs_stream, step_low, step_high, ROTATION)
            h = tl.reshape(tl.reshape(h, [H * W // ROTATION, ROTATION]) * sign[None, :], [H, W])
        h = hadamard(h, ROTATION, H, W) * HALF
    return h, r, c


@triton.jit(do_not_specialize=_SCALARS)
def _top(
    x, top, clock, rows, columns, width, row_stride, column_stride, seed, signs_stream,
    ROTATION: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr,
    G: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """The largest |h| of all tiles without a NaN or infinity, as bits."""
    step_low, step_high = load_step(clock, SIGNS)
    h, _r, _c = _piece(
        x, rows, columns, width, row_stride, column_stride, seed, signs_stream, step_low, step_high,
        ROTATION, SIGNS, HALF, G * TH, TW,
    )  # fmt: skip
    bits_G = max_bits(tl.reshape(h, [G, TH * TW]))
    tl.atomic_max(top, tl.reduce(tl.where(bits_G >= 0x7F800000, 0, bits_G), 0, _maximum))


@triton.jit
def _values(h_GB, bits_G, group_G, random_GB, FMT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What the codes of blocks stand for. bits_G: of their largest |h|."""
    marked_G = bits_G >= 0x7F800000
    scale_G = scale_patterns(tl.where(marked_G, 0, bits_G), group_G, marked_G, FMT, False)
    s_G = decode_scales(scale_G, group_G, FMT)
    return decode_codes(encode_codes(h_GB, s_G, marked_G, random_GB, FMT, STOCHASTIC), s_G, FMT)


@triton.jit(do_not_specialize=_SCALARS)
def _quantize(
    x, out, top, clock, rows, columns, width, row_stride, column_stride, seed, stream, signs_stream,
    FMT: tl.constexpr, SCALE: tl.constexpr, STOCHASTIC: tl.constexpr, SECOND: tl.constexpr,
    ROTATION: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr,
    G: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """top: float32 magnitudes of rows or of the whole; bits of the largest of all tiles (nvfp4); else not read."""
    step_low, step_high = load_step(clock, STOCHASTIC or SIGNS)
    h, r, c = _piece(
        x, rows, columns, width, row_stride, column_stride, seed, signs_stream, step_low, step_high,
        ROTATION, SIGNS, HALF, G * TH, TW,
    )  # fmt: skip
    h_GB = tl.reshape(h, [G, TH * TW])
    random_GB = h_GB
    if SCALE == 0:
        bits_G = max_bits(h_GB)
        if STOCHASTIC:
            across = (width + TW - 1) // TW
            tile = (tl.program_id(0) // across * G + tl.arange(0, G)).to(tl.int64) * across + tl.program_id(0) % across
            random_GB = block_offsets(tile, seed, stream, step_low, step_high, G, TH * TW)
    else:
        if SCALE == 1:
            bits_G = float_bits(tl.load(top + r, mask=r < rows, other=0.0)) & 0x7FFFFFFF
        else:
            bits_G = float_bits(tl.load(top + tl.full([G], 0, tl.int32))) & 0x7FFFFFFF
        if STOCHASTIC:
            element = r.to(tl.int64)[:, None] * columns + c[None, :]
            random_GB = element_offsets(element, seed, stream, step_low, step_high)
    group_G = tl.full([G], 0.0, tl.float32)
    if FMT.scale == "e4m3":
        group_G = bits_float(tl.load(top + tl.full([G], 0, tl.int32)))
    if SECOND:
        value_GB = _values(h_GB, bits_G, group_G, random_GB, FMT, False)
        lost_GB = h_GB - value_GB
        value_GB += _values(lost_GB, max_bits(lost_GB), group_G, random_GB, FMT, STOCHASTIC)
    else:
        value_GB = _values(h_GB, bits_G, group_G, random_GB, FMT, STOCHASTIC)
    places = r.to(tl.int64)[:, None] * width + c[None, :]
    tl.store(out + places, tl.reshape(value_GB, [G * TH, TW]), mask=(r < rows)[:, None] & (c < width)[None, :])


def serves(operand: Operand) -> bool:
    """Whether the kernel has this operand: others are left to plain torch."""
    (height, width), wants_all = operand.tile, operand.format.group > 0
    if operand.second == "outliers" or (operand.second == "all" and wants_all):
        return False  # a second number from all tiles
    if operand.tile in ((0, 0), (1, 0)):
        return operand.second == "none" and not wants_all
    powers = all(side & (side - 1) == 0 for side in operand.tile)
    return powers and width >= 8 and 16 <= height * width <= _LARGEST_TILE


def rotates(operand: Operand, rotation: int) -> bool:
    """Whether whole runs of a rotation lie in each tile, so that the kernel can do it."""
    return operand.tile[1] > 0 and operand.tile[1] % rotation == 0


def quantize(
    x_RC: Tensor, out_RW: Tensor, operand: Operand, clock: Tensor, rotation: int, signs: bool, key: tuple[int, int, int]
) -> None:
    """out = `quantized` of x, rotated in runs of `rotation` elements first unless that is 0.

    x_RC: float32, bfloat16 or float16, any strides, not empty. out_RW: float32, contiguous, W = C rounded up to whole
    runs. clock: int64, one number, on the device of x. key: seed, stream of the random bits and of the signs.
    """
    (rows, columns), width = x_RC.shape, out_RW.shape[1]
    scale, (height, breadth) = TILES, operand.tile
    top = out_RW
    if not breadth:
        scale, (height, breadth) = (ONE if not height else ROW), (1, 64)
        top = torch.linalg.vector_norm(x_RC, torch.inf, dim=1).to(torch.float32)
        top = top.amax().view(1) if scale == ONE else top
    size = max(height * breadth, _PIECE)
    blocks = size // (height * breadth)
    pieces = (triton.cdiv(rows, blocks * height) * triton.cdiv(width, breadth),)
    x = x_RC.view(torch.int16) if x_RC.dtype == torch.bfloat16 else x_RC
    seed, stream, signs_stream = (((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for word in key)
    sizes = rows, columns, width, *x_RC.stride()
    cut = {"ROTATION": rotation, "SIGNS": signs, "HALF": 0.5 ** ((max(rotation, 1).bit_length() - 1) // 2)}
    cut |= {"G": blocks, "TH": height, "TW": breadth, "num_warps": max(size // 1024, 4), "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        if operand.format.scale == "e4m3":
            top = torch.zeros(1, dtype=torch.int32, device=x.device)
            _top[pieces](x, top, clock, *sizes, seed, signs_stream, **cut)
        _quantize[pieces](
            x, out_RW, top, clock, *sizes, seed, stream, signs_stream, FMT=tile_format(operand.format), SCALE=scale,
            STOCHASTIC=operand.rounding == "stochastic", SECOND=operand.second == "all", **cut,
        )  # fmt: skip
