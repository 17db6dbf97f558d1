"""Formats of kind "spikes": the two largest magnitudes of a block are kept, the rest are integers of 2 to 8 bits.

Activations have outliers, a few channels far above all others, and one of them sets the step of its whole block. Kept
apart, with its place in the block, it costs a few bytes and the step is that of the rest:

    kept  = the two largest |x| of the block (the first of equal ones), as bf16 or fp32, and their places
    s     = largest |x| of the rest, rounded up to bf16 or as fp32
    codes = the five lines of formats.py for the rest, 0 at the places of those kept

Codes of a block stand in planes of 4, 2 and 1 bits (`wire.pack_planes`), so any width is packed and unpacked by the
same shifts as 4, 2 and 1 are. Source: FlashCommunication V2 (arXiv 2508.03760): bit splitting and spike reserving;
there the smallest and the largest value are kept and the rest is re-ranged between them, here zero stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.scales import aligned, as_float, bf16_nearest, bf16_up, magnitude_bits

KEPT = 2
"""Values of a block that are kept."""
_INF, _NAN32, _NAN16 = 0x7F800000, 0x7FC00000, 0x7FC0
_BF16_FINITE = 0x7F7FFFFF


def split_spikes(h_GB: Tensor) -> tuple[Tensor, Tensor]:
    """The places (G, 2) int64 of the two largest |h| of each block, and h (G, B) with 0 there. No NaN among them."""
    lane_B = torch.arange(h_GB.shape[1], device=h_GB.device)
    bits_GB, places = magnitude_bits(h_GB), []
    for _ in range(KEPT):
        top_G1 = bits_GB.amax(dim=-1, keepdim=True)
        place_G1 = torch.where(bits_GB == top_G1, lane_B, h_GB.shape[1]).amin(dim=-1, keepdim=True)
        bits_GB = bits_GB.scatter(1, place_G1, -1)
        places.append(place_G1)
    return torch.cat(places, dim=-1), h_GB.masked_fill(bits_GB < 0, 0.0)


def encode_spikes(h_GB: Tensor, fmt: Format, random_GB: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Records (G, scale bytes) of blocks, the rest (G, B) whose codes go with them, and marks (G,) of those not finite.

    random_GB: 16 random bits for each element, or None for nearest rounding; they round what is kept, too.
    """
    marked_G = magnitude_bits(h_GB).amax(dim=-1) >= _INF
    h_GB = h_GB.masked_fill(marked_G[:, None], 0.0)
    places_G2, rest_GB = split_spikes(h_GB)
    scale_G1 = magnitude_bits(rest_GB).amax(dim=-1, keepdim=True)
    kept_G2 = h_GB.gather(1, places_G2)
    bits_G2, sign_G2 = magnitude_bits(kept_G2), (kept_G2.contiguous().view(torch.int32) >> 31) & 1
    if fmt.scale == "fp32x3":
        words_G3 = torch.cat((scale_G1, bits_G2 | sign_G2 << 31), dim=-1).masked_fill(marked_G[:, None], _NAN32)
        words_GS = words_G3.view(torch.uint8)
        filler_GS = words_GS.new_zeros((len(words_GS), 2))
    else:
        if random_GB is None:
            top_G2 = bf16_nearest(bits_G2)
        else:
            top_G2 = (bits_G2 + random_GB.gather(1, places_G2).to(torch.int32)).clamp(max=_BF16_FINITE) >> 16
        words_G3 = torch.cat((bf16_up(scale_G1), top_G2 | sign_G2 << 15), dim=-1)
        words_G3 = words_G3.masked_fill(marked_G[:, None], _NAN16).to(torch.int16)
        words_GS = words_G3.view(torch.uint8)
        filler_GS = words_GS[:, :0]
    return torch.cat((words_GS, places_G2.to(torch.uint8), filler_GS), dim=-1), rest_GB, marked_G


def decode_records(records_GS: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """The scales (G,) and kept values (G, 2) as float32, and the places (G, 2), of records."""
    if fmt.scale == "fp32x3":
        words_G3 = as_float(aligned(records_GS[:, :12]).view(torch.int32))
        places_G2 = records_GS[:, 12:14]
    else:
        words_G3 = aligned(records_GS[:, :6]).view(torch.bfloat16).to(torch.float32)
        places_G2 = records_GS[:, 6:8]
    return words_G3[:, 0], words_G3[:, 1:], places_G2.to(torch.int64)


def put_back(x_GB: Tensor, kept_G2: Tensor, places_G2: Tensor) -> Tensor:
    """x with the kept values at their places; places outside of the block, which no encoder writes, keep nothing.

    Of two equal places the first counts.
    """
    lane_B = torch.arange(x_GB.shape[1], device=x_GB.device)
    for k in reversed(range(KEPT)):
        x_GB = torch.where(lane_B == places_G2[:, k, None], kept_G2[:, k, None], x_GB)
    return x_GB
