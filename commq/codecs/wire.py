"""The wire buffer: the only place that knows byte offsets.

A tensor of `numel` elements is cut into `chunks` equal chunks, one for each rank that will own one. On the wire
every chunk is one contiguous row, so that an all-to-all sends rows as they are:

    | codes: chunk_numel * bits / 8 | scales: one per block | group scales: fp32, one per group (nvfp4) |

each section padded to 16 bytes (block formats) so that kernels read and write 16 bytes at a time. Codes stand in
element order; where several share a byte (of 3 bits: eight share three bytes), the first is in the lowest bits. All
numbers are little-endian. Integer codes are two's complement, sign codes are 1 for x >= 0, float codes are the usual
bit patterns (sign first), codes of levels are their numbers in the table. Codes of spikes stand in planes, block by
block, and in place of its scale each block has a record: scale, two kept values, two places of a byte.
Raw formats are the plain elements, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from commq.codecs.formats import SCALE_BYTES, Format


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a wire buffer of (chunks, chunk_bytes) uint8.

    numel: elements of the whole tensor (N); chunks: rows (W); align: a power of two that chunks are a multiple of
    besides the format's own unit (the length of a rotation, the unit of the answer's format).
    The last rows may be partly or wholly empty; what stands there decodes to nothing and is never random memory.
    """

    format: Format
    numel: int
    chunks: int = 1
    align: int = 1

    def __post_init__(self) -> None:
        if self.numel < 0 or self.chunks < 1:
            raise ValueError(f"numel={self.numel}, chunks={self.chunks}: expected numel >= 0 and chunks >= 1")

    @property
    def unit(self) -> int:
        """Elements that must stay in one chunk: a block, a group and a rotated run stay whole."""
        return max(self.format.unit, self.align)

    @cached_property
    def chunk_numel(self) -> int:
        """Elements of a chunk (C): equal for all chunks, a multiple of `unit`."""
        return _ceil(-(-self.numel // self.chunks), self.unit)

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk (G)."""
        return self.chunk_numel // self.format.block

    def valid(self, chunk: int) -> int:
        """Elements of the tensor, without padding, in chunk number `chunk`."""
        return min(max(self.numel - chunk * self.chunk_numel, 0), self.chunk_numel)

    @property
    def scales_offset(self) -> int:
        return self._section(self.chunk_numel * self.format.bits // 8)

    @property
    def groups_offset(self) -> int:
        return self.scales_offset + self._section(self.chunk_blocks * SCALE_BYTES[self.format.scale])

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one row."""
        if self.format.kind == "raw":
            return self.scales_offset
        groups = self.chunk_numel // self.format.group if self.format.group else 0
        return self.groups_offset + self._section(4 * groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer: chunks * chunk_bytes."""
        return self.chunks * self.chunk_bytes

    def _section(self, nbytes: int) -> int:
        return nbytes if self.format.kind == "raw" else _ceil(nbytes, 16)

    # Views into a wire buffer of (K, >= chunk_bytes) uint8; K is any number of rows of this layout.

    def codes(self, wire_KS: Tensor) -> Tensor:
        return wire_KS[:, : self.chunk_numel * self.format.bits // 8]

    def scales(self, wire_KS: Tensor) -> Tensor:
        nbytes = self.chunk_blocks * SCALE_BYTES[self.format.scale]
        return wire_KS[:, self.scales_offset : self.scales_offset + nbytes]

    def groups(self, wire_KS: Tensor) -> Tensor:
        nbytes = 4 * (self.chunk_numel // self.format.group)
        return wire_KS[:, self.groups_offset : self.groups_offset + nbytes]


def pack(codes_KC: Tensor, bits: int) -> Tensor:
    """Pack integer codes, taken modulo 2**bits, into uint8 (K, C * bits / 8); the first code in the low bits."""
    if bits == 8:
        return codes_KC.to(torch.uint8)
    if bits == 3:
        eights = (codes_KC & 7).to(torch.int32).unflatten(-1, (-1, 8))
        word = (eights << torch.arange(0, 24, 3, device=eights.device)).sum(dim=-1)
        return torch.stack((word & 255, word >> 8 & 255, word >> 16), dim=-1).flatten(-2).to(torch.uint8)
    per_byte = 8 // bits
    codes = (codes_KC & ((1 << bits) - 1)).to(torch.uint8).unflatten(-1, (-1, per_byte))
    packed = codes[..., 0].clone()
    for i in range(1, per_byte):
        packed |= codes[..., i] << (i * bits)
    return packed


def planes(bits: int) -> list[int]:
    """The widths of the planes that codes of 2 to 8 bits are split into, from the lowest bits on: 7 is 4, 2 and 1."""
    return [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]


def pack_planes(codes_GB: Tensor, bits: int) -> Tensor:
    """Pack the codes of each block, taken modulo 2**bits, plane after plane: uint8 (G, B * bits / 8)."""
    packed, shift = [], 0
    for width in planes(bits):
        packed.append(pack(codes_GB >> shift, width))
        shift += width
    return torch.cat(packed, dim=-1)


def unpack_planes(packed_GP: Tensor, bits: int) -> Tensor:
    """The codes of `pack_planes`, as uint8 in [0, 2**bits): (G, P * 8 / bits)."""
    block = packed_GP.shape[-1] * 8 // bits
    parts = packed_GP.split([block * width // 8 for width in planes(bits)], dim=-1)
    codes, shift = unpack(parts[0], planes(bits)[0]), planes(bits)[0]
    for part, width in zip(parts[1:], planes(bits)[1:], strict=True):
        codes = codes | unpack(part, width) << shift
        shift += width
    return codes


def unpack(packed_KP: Tensor, bits: int) -> Tensor:
    """The codes of `pack`, as uint8 in [0, 2**bits): (K, P * 8 / bits)."""
    if bits == 8:
        return packed_KP
    if bits == 3:
        threes = packed_KP.to(torch.int32).unflatten(-1, (-1, 3))
        word = threes[..., 0] | threes[..., 1] << 8 | threes[..., 2] << 16
        return ((word[..., None] >> torch.arange(0, 24, 3, device=word.device)) & 7).flatten(-2).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_KP.device)
    return ((packed_KP[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
