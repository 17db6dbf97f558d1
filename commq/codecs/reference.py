"""The specification: encode, decode and reduce in plain torch.

Every other implementation (CPU and CUDA library, Triton) has these signatures and gives these bytes. It is slow,
always available, and runs on any device. Start reading here; `formats.py` has the five lines of arithmetic, `wire.py`
the byte offsets.

Shape letters: N elements of a bucket, W rows of the wire (one for each rank's chunk), K rows received, C elements of
a chunk, G blocks, B elements of a block, S bytes of a row.

Numbers that are not finite: a block that holds one gets a NaN scale and zero codes, decodes to NaN everywhere, and
leaves its residual as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from commq.codecs import rounding, scales
from commq.codecs.formats import Format
from commq.codecs.philox import random_u16
from commq.codecs.rotation import Rotation, rotate, unrotate
from commq.codecs.wire import Layout, pack, unpack

_FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What encoding needs besides the format: rounding, rotation and where the random bits come from."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotation: Rotation | None = None
    seed: int = 0
    """32 bits, the same on all ranks."""
    step: int = 0
    """64 bits: the optimizer step."""
    stream: int = 0
    """32 bits, different for each rank and hop: rounding errors of different ranks must not be the same."""


@dataclass(frozen=True)
class Blocks:
    """Which blocks a buffer holds, where they are not simply block 0, 1, 2, ... of one tensor.

    ids_G: int64, number of each block in a global numbering (the counter of its random bits).
    valid_G: int32, elements of each block that are not padding (sign's mean divides by it).
    """

    ids_G: Tensor
    valid_G: Tensor

    def chunk(self, index: int, layout: Layout) -> Blocks:
        start = index * layout.chunk_blocks
        return Blocks(
            self.ids_G[start : start + layout.chunk_blocks], self.valid_G[start : start + layout.chunk_blocks]
        )


def count_blocks(layout: Layout, device: torch.device) -> Blocks:
    """Blocks 0, 1, 2, ... of one tensor of layout.numel elements, padding included."""
    block = layout.format.block
    ids_G = torch.arange(layout.chunks * layout.chunk_blocks, device=device)
    return Blocks(ids_G, (layout.numel - ids_G * block).clamp(0, block).to(torch.int32))


def encode_bucket(
    x_N: Tensor,
    wire_WS: Tensor,
    layout: Layout,
    coding: Coding,
    *,
    prescale: float = 1.0,
    residual_N: Tensor | None = None,
    residual_scales_G: Tensor | None = None,
    decay: float = 0.0,
    blocks: Blocks | None = None,
) -> None:
    """Encode a bucket into a send buffer, with error feedback.

    x_N: float32, bfloat16 or float16, N = layout.numel, contiguous; read only. wire_WS: uint8, W = layout.chunks
    rows of at least layout.chunk_bytes, row stride free; every byte of [0, chunk_bytes) of each row is written.
    With a residual e (float32 or bfloat16; or int8 with one float32 scale for each block of the format), both
    are read and written in place, element by element:

        h = x * prescale + e ;  sent = decode(encode(h)) ;  e <- decay * e + (1 - decay) * (h - sent)

    where sent is finite, and e stays where it is not. decay = 0 is classic error feedback.
    Error: |h - sent| <= `error_bound` of the format. Raw formats take no residual.
    """
    h_N = x_N.to(torch.float32)
    if prescale != 1.0:
        h_N = h_N * prescale
    e_N = None
    if residual_N is not None:
        e_N = load_residual(residual_N, residual_scales_G, layout.format.block)
        h_N = h_N + e_N
    padding = layout.chunks * layout.chunk_numel - layout.numel
    y = torch.nn.functional.pad(h_N, (0, padding)) if padding else h_N
    signs = None
    if coding.rotation is not None:
        signs = coding.rotation.sign_pattern(seed=coding.seed, step=coding.step, device=x_N.device)
        y = rotate(y, coding.rotation, signs)
    encode_rows(y.view(layout.chunks, layout.chunk_numel), wire_WS, layout, coding, blocks)
    if residual_N is None or e_N is None:
        return
    sent = decode_rows(wire_WS, layout).view(-1)
    if coding.rotation is not None:
        sent = unrotate(sent, coding.rotation, signs)
    sent_N = sent[: layout.numel]
    update = (h_N - sent_N) * (1.0 - decay)
    if decay:
        update = e_N * decay + update
    store_residual(update, sent_N.isfinite(), residual_N, residual_scales_G, layout.format.block)


def decode_bucket(wire_WS: Tensor, layout: Layout, out_N: Tensor, coding: Coding, *, accumulate: bool = False) -> None:
    """Decode all chunks into out_N (float32, bfloat16 or float16; N = layout.numel), undoing the rotation.

    accumulate: add to out_N (in float32, then cast) instead of writing. Any bytes decode without reading or
    writing out of bounds.
    """
    x = decode_rows(wire_WS, layout).view(-1)
    if coding.rotation is not None:
        signs = coding.rotation.sign_pattern(seed=coding.seed, step=coding.step, device=x.device)
        x = unrotate(x, coding.rotation, signs)
    x_N = x[: layout.numel]
    out_N.copy_(out_N.to(torch.float32) + x_N if accumulate else x_N)


def decode_sum(wire_KS: Tensor, layout: Layout, *, divisor: float = 1.0) -> Tensor:
    """Sum K encoded versions of one chunk: float32 (C,), rows added in order, then divided (IEEE) by `divisor`.

    A rotation is not undone: it commutes with the sum.
    """
    rows_KC = decode_rows(wire_KS, layout)
    total_C = rows_KC[0].clone()
    for row_C in rows_KC[1:]:
        total_C += row_C
    return total_C if divisor == 1.0 else total_C / torch.full_like(total_C, divisor)


def decode_sum_encode(
    wire_KS: Tensor,
    layout: Layout,
    answer_S: Tensor,
    answer_layout: Layout,
    coding: Coding,
    *,
    chunk: int,
    divisor: float = 1.0,
    residual_C: Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """Reduce chunk number `chunk` and encode the answer, possibly in another format: one row of answer_layout.

    Both layouts have the same numel, chunks and chunk_numel. coding.rotation is not applied (the sum already is
    rotated, if anything is). residual_C: float32 feedback of this hop (classic), in the same domain as the sum.
    blocks: of the whole tensor in blocks of the answer's format.
    """
    total_C = decode_sum(wire_KS, layout, divisor=divisor)
    if residual_C is not None:
        total_C = total_C + residual_C
    blocks = blocks or count_blocks(answer_layout, wire_KS.device)
    row_1S = answer_S.view(1, -1)
    encode_rows(total_C.view(1, -1), row_1S, answer_layout, coding, blocks.chunk(chunk, answer_layout))
    if residual_C is not None:
        sent_C = decode_rows(row_1S, answer_layout)[0]
        lost_C = (total_C - sent_C).clamp(-_FLOAT_MAX, _FLOAT_MAX)
        residual_C.copy_(torch.where(sent_C.isfinite(), lost_C, residual_C))


def encode_rows(x_KC: Tensor, wire_KS: Tensor, layout: Layout, coding: Coding, blocks: Blocks | None) -> None:
    """Encode float32 rows, already padded and rotated, each into one row of the wire."""
    fmt = layout.format
    if layout.chunk_numel == 0:
        return
    blocks = blocks or count_blocks(layout, x_KC.device)
    random_GB = None
    if coding.rounding == "stochastic":
        # Raw formats have no blocks; their counter runs over elements all the same.
        ids_G = blocks.ids_G if fmt.kind != "raw" else torch.arange(-(-x_KC.numel() // 16), device=x_KC.device)
        random_GB = random_u16(ids_G, fmt.block, seed=coding.seed, step=coding.step, stream=coding.stream)
    if fmt.kind == "raw":
        raw = _encode_raw(x_KC, fmt, None if random_GB is None else random_GB.view(-1)[: x_KC.numel()])
        layout.codes(wire_KS).copy_(raw)
        return
    codes_GB, scales_GS, groups_Q4 = encode_blocks(x_KC.reshape(-1, fmt.block), fmt, random_GB, valid_G=blocks.valid_G)
    _write_rows(wire_KS, layout, codes_GB, scales_GS, groups_Q4 if fmt.group else None)


def encode_blocks(
    h_GB: Tensor, fmt: Format, random_GB: Tensor | None, *, valid_G: Tensor, per_group: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (G, B, int32), scale bytes (G, n) and group bytes (Q, 4) of blocks of float32, of any B.

    random_GB: 16 random bits for stochastic rounding; None: nearest. valid_G, int32: elements of each block that are
    not padding. per_group: blocks that share a group's scale (nvfp4), by default as the format says.
    """
    nearest = random_GB is None
    if fmt.kind == "means":
        codes_GB, scales_GS, _ = scales.encode_means(h_GB, valid_G)
        return codes_GB, scales_GS, scales_GS.new_empty((0, 4))
    if fmt.fit != "largest":
        y_GB, t_GB, energy_G, marked_G = scales.normalise(h_GB, fmt)
        codes_GB = rounding.level_codes(t_GB, fmt, None)
        level_GB = rounding.code_values(codes_GB, fmt)
        scales_GS = scales.fitted_scales(h_GB, y_GB, energy_G, marked_G, level_GB, fmt)
        return codes_GB, scales_GS, scales_GS.new_empty((0, 4))
    scales_GS, groups_Q4, marked_G = scales.encode_scales(
        h_GB, valid_G, fmt, mean=fmt.kind == "sign" and nearest, per_group=per_group
    )
    s_G = scales.decode_scales(scales_GS, groups_Q4, fmt, per_group=per_group)
    t_GB = _scaled(h_GB, s_G, marked_G, fmt)
    if fmt.kind == "integer":
        codes_GB = rounding.integer_codes(t_GB, fmt, random_GB)
    elif fmt.kind == "sign":
        codes_GB = rounding.sign_codes(h_GB.masked_fill(marked_G[:, None], 0.0) if nearest else t_GB, random_GB)
    elif fmt.kind == "levels":
        codes_GB = rounding.level_codes(t_GB, fmt, random_GB)
    else:
        top = rounding.top_code(fmt)
        codes_GB = rounding.float_codes(t_GB, fmt.exponent, fmt.mantissa, top, random_GB)
    return codes_GB, scales_GS, groups_Q4


def _write_rows(wire_KS: Tensor, layout: Layout, codes_GB: Tensor, scales_GS: Tensor, groups_Q4: Tensor | None) -> None:
    rows = wire_KS.shape[0]
    wire_KS[:, : layout.chunk_bytes].zero_()  # the padding between sections
    layout.codes(wire_KS).copy_(pack(codes_GB.view(rows, -1), layout.format.bits))
    layout.scales(wire_KS).copy_(scales_GS.view(rows, -1))
    if groups_Q4 is not None:
        layout.groups(wire_KS).copy_(groups_Q4.view(rows, -1))


def decode_rows(wire_KS: Tensor, layout: Layout) -> Tensor:
    """float32 (K, C) of K rows of the wire, still rotated, padding included."""
    fmt = layout.format
    rows = wire_KS.shape[0]
    if layout.chunk_numel == 0:
        return torch.empty((rows, 0), device=wire_KS.device)
    codes_KP = layout.codes(wire_KS)
    if fmt.kind == "raw":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[fmt.name]
        return scales.aligned(codes_KP).view(dtype).to(torch.float32)
    scales_GS = layout.scales(wire_KS).reshape(rows * layout.chunk_blocks, -1)
    groups_Q4 = layout.groups(wire_KS).reshape(-1, 4) if fmt.group else wire_KS.new_empty((0, 4))
    if fmt.kind == "means":
        return scales.decode_means(unpack(codes_KP, 1).view(-1, fmt.block), scales_GS).view(rows, -1)
    return decode_blocks(unpack(codes_KP, fmt.bits).reshape(-1, fmt.block), scales_GS, groups_Q4, fmt).view(rows, -1)


def decode_blocks(
    codes_GB: Tensor, scales_GS: Tensor, groups_Q4: Tensor, fmt: Format, *, per_group: int | None = None
) -> Tensor:
    """float32 (G, B) of unpacked uint8 codes and of what `encode_blocks` gave with them; not for means."""
    s_G = scales.decode_scales(scales_GS, groups_Q4, fmt, per_group=per_group)
    values_GB = rounding.code_values(codes_GB, fmt)
    if fmt.scale != "e8m0":
        values_GB = values_GB * (1.0 / fmt.max_code)
    return values_GB * s_G[:, None]


def _scaled(h_GB: Tensor, s_G: Tensor, marked_G: Tensor, fmt: Format) -> Tensor:
    """t = h * (max_code / s), 0 in marked and in all-zero blocks; h * 2**-e where the scale is a power of two."""
    if fmt.scale == "e8m0":
        t_GB = h_GB * (1.0 / s_G)[:, None]  # exact: 2**-e is a normal number for e in [-127, 126]
        return t_GB.masked_fill(marked_G[:, None], 0.0)
    up_G = scales.lift(s_G)
    inverse_G = torch.where(s_G > 0, scales.quotient(fmt.max_code, s_G * up_G), 0.0)
    t_GB = (h_GB * up_G[:, None]) * inverse_G[:, None]
    return t_GB.masked_fill((marked_G | (s_G == 0))[:, None], 0.0)


def _encode_raw(x_KC: Tensor, fmt: Format, random: Tensor | None) -> Tensor:
    """Bytes of raw elements; a NaN becomes the canonical quiet NaN."""
    nan = x_KC.isnan()
    if fmt.name == "fp32":
        return x_KC.masked_fill(nan, float("nan")).view(torch.uint8)
    bits = x_KC.contiguous().view(torch.int32)
    if fmt.name == "fp16":
        return x_KC.to(torch.float16).masked_fill(nan, float("nan")).view(torch.uint8)
    if random is None:
        return x_KC.to(torch.bfloat16).masked_fill(nan, float("nan")).view(torch.uint8)
    rounded = bits.to(torch.int64) + random.view(x_KC.shape)
    # Finite numbers stay finite, infinities stay as they are.
    low = rounded & 0x7FFFFFFF
    capped = torch.where(x_KC.isfinite(), low.clamp(max=0x7F7FFFFF), low - random.view(x_KC.shape))
    high = ((capped >> 16) | ((bits.to(torch.int64) >> 16) & 0x8000)).masked_fill(nan, 0x7FC0)
    return high.to(torch.int16).view(torch.uint8)


def load_residual(residual_N: Tensor, residual_scales_G: Tensor | None, block: int) -> Tensor:
    """The residual as float32 (N,). int8 storage: (code * (1 / 127)) * scale of its block."""
    if residual_scales_G is None:
        return residual_N.to(torch.float32)
    scale_N = residual_scales_G.repeat_interleave(block)[: residual_N.numel()]
    return (residual_N.to(torch.float32) * (1.0 / 127.0)) * scale_N


def store_residual(
    e_N: Tensor, keep_N: Tensor, residual_N: Tensor, residual_scales_G: Tensor | None, block: int
) -> None:
    """Write e where `keep_N` says so, saturating: a residual is never infinite. int8: as the format int8."""
    e_N = e_N.clamp(-_FLOAT_MAX, _FLOAT_MAX)
    if residual_scales_G is None:
        top = torch.finfo(residual_N.dtype).max
        residual_N.copy_(torch.where(keep_N, e_N.clamp(-top, top).to(residual_N.dtype), residual_N))
        return
    padding = residual_scales_G.numel() * block - e_N.numel()
    e_GB = torch.nn.functional.pad(e_N.masked_fill(~keep_N, 0.0), (0, padding)).view(-1, block)
    keep_GB = torch.nn.functional.pad(keep_N, (0, padding), value=True).view(-1, block)
    amax_G = scales.as_float(scales.magnitude_bits(e_GB).amax(dim=-1))
    up_G = scales.lift(amax_G)
    inverse_G = torch.where(amax_G > 0, scales.quotient(127.0, amax_G * up_G), 0.0)
    codes_GB = torch.round((e_GB * up_G[:, None]) * inverse_G[:, None]).clamp(-127, 127).to(torch.int8)
    codes_N = codes_GB.view(-1)[: e_N.numel()]
    residual_N.copy_(torch.where(keep_N, codes_N, residual_N))
    residual_scales_G.copy_(torch.where(keep_GB.all(dim=-1), amax_G, residual_scales_G))
