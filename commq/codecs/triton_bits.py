# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton building blocks that are exact on every backend: bits, words, random numbers, packing, rotation.

Only additions, multiplications, comparisons and integer operations, so that a GPU and the interpreter on a CPU agree
to the bit: no fp8 or bfloat16 conversions, no libdevice. Shape letters as in `reference.py`; P packed bytes of a block.
"""

import triton
import triton.language as tl

# What tl.max combines with; used directly, it works compiled and interpreted in one process.
_maximum = tl.standard._elementwise_max


@triton.jit
def float_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_even(x):
    """Round half to even, for |x| < 2**22: adding 1.5 * 2**23 leaves no bits below the unit."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def bfloat16_bits(x):
    """The bfloat16 nearest to float32 x, as the low 16 bits of an int32; a NaN becomes 0x7FC0."""
    bits = float_bits(x)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest)


@triton.jit
def floor_integer(x):
    """floor(x) as int32, for |x| < 2**31. tl.floor flushes subnormals on a GPU."""
    integer = x.to(tl.int32)
    return tl.where(integer.to(tl.float32) > x, integer - 1, integer)


@triton.jit
def load_tile(pointer, offsets, inside, TILE: tl.constexpr, OTHER: tl.constexpr = 0):
    """Elements of a tile, OTHER from `inside` on. A whole tile is loaded without a mask, in 16-byte pieces."""
    if inside == TILE:
        value = tl.load(pointer + offsets)
    else:
        value = tl.load(pointer + offsets, mask=offsets < inside, other=OTHER)
    return value


@triton.jit
def store_tile(pointer, offsets, value, inside, TILE: tl.constexpr):
    """Store the first `inside` elements of a tile."""
    if inside == TILE:
        tl.store(pointer + offsets, value)
    else:
        tl.store(pointer + offsets, value, mask=offsets < inside)


@triton.jit
def to_float(value):
    """float32 of float32, float16 or integer elements; int16 stands for bfloat16."""
    if value.dtype == tl.int16:
        return bits_float(value.to(tl.int32) << 16)
    else:
        return value.to(tl.float32)


@triton.jit
def from_float(x, dtype: tl.constexpr):
    """Float32 x rounded to float32, float16 or (as int16) bfloat16."""
    if dtype == tl.int16:
        return bfloat16_bits(x).to(tl.int16)
    else:
        return x.to(dtype)


@triton.jit
def load_word(pointer, offsets, mask, NBYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """Little-endian words of 1, 2 or 4 bytes as int32, zero-extended. pointer: uint8; offsets count words."""
    if NBYTES == 1:
        word = tl.load(pointer + offsets, mask=mask, other=0).to(tl.int32)
    elif ALIGNED:
        dtype: tl.constexpr = tl.int32 if NBYTES == 4 else tl.uint16
        word = tl.load(pointer.to(tl.pointer_type(dtype)) + offsets, mask=mask, other=0).to(tl.int32)
    else:
        word = tl.load(pointer + offsets * NBYTES, mask=mask, other=0).to(tl.int32)
        for i in tl.static_range(1, NBYTES):
            word |= tl.load(pointer + (offsets * NBYTES + i), mask=mask, other=0).to(tl.int32) << (8 * i)
    return word


@triton.jit
def store_word(pointer, offsets, word, mask, NBYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """Store the low NBYTES bytes of int32 words, little-endian. pointer: uint8; offsets count words."""
    if NBYTES == 1:
        tl.store(pointer + offsets, word.to(tl.uint8), mask=mask)
    elif ALIGNED:
        dtype: tl.constexpr = tl.int32 if NBYTES == 4 else tl.int16
        tl.store(pointer.to(tl.pointer_type(dtype)) + offsets, word.to(dtype), mask=mask)
    else:
        for i in tl.static_range(NBYTES):
            tl.store(pointer + (offsets * NBYTES + i), (word >> (8 * i)).to(tl.uint8), mask=mask)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 of uint32 counters and keys; see philox.py."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def random_words(index, seed, stream, step_low, step_high):
    """The four random uint32 words of counters `index` (int64): each counter serves 8 elements."""
    c2 = tl.full(index.shape, 0, tl.uint32) + step_low.to(tl.uint32)
    c3 = tl.full(index.shape, 0, tl.uint32) + step_high.to(tl.uint32)
    return philox(index.to(tl.uint32), (index >> 32).to(tl.uint32), c2, c3, seed.to(tl.uint32), stream.to(tl.uint32))


@triton.jit
def random_offset(half_word):
    """16 random bits as a float32 in (0, 1): (r + 1/2) * 2**-16."""
    return (half_word.to(tl.int32).to(tl.float32) + 0.5) * 0.0000152587890625


@triton.jit
def block_offsets(ids_G, seed, stream, step_low, step_high, G: tl.constexpr, B: tl.constexpr):
    """Random offsets (G, B) of blocks with the given numbers: 8 neighbours share a counter."""
    index = ids_G[:, None] * (B // 8) + tl.arange(0, B // 8)[None, :]
    w0, w1, w2, w3 = random_words(index, seed, stream, step_low, step_high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [G, B // 2])
    return tl.reshape(random_offset(tl.join(words & 0xFFFF, words >> 16)), [G, B])


@triton.jit
def element_offsets(element, seed, stream, step_low, step_high):
    """Random offsets of elements with the given numbers (int64), in no particular order: one counter each."""
    w0, w1, w2, w3 = random_words(element >> 3, seed, stream, step_low, step_high)
    word = tl.where((element & 4) == 0, tl.where((element & 2) == 0, w0, w1), tl.where((element & 2) == 0, w2, w3))
    return random_offset(tl.where((element & 1) == 0, word & 0xFFFF, word >> 16))


@triton.jit
def pack(codes_GB, BITS: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """uint8 (G, B * BITS / 8) of integer codes, taken modulo 2**BITS; the first code in the low bits."""
    packed = (codes_GB & ((1 << BITS) - 1)).to(tl.uint8)
    if BITS <= 1:
        low, high = tl.split(tl.reshape(packed, [G, B // 2, 2]))
        packed = low | (high << 1)
    if BITS <= 2:
        low, high = tl.split(tl.reshape(packed, [G, B * BITS // 4, 2]))
        packed = low | (high << 2)
    if BITS <= 4:
        low, high = tl.split(tl.reshape(packed, [G, B * BITS // 8, 2]))
        packed = low | (high << 4)
    return packed


@triton.jit
def unpack(packed_GP, BITS: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """The codes of `pack` as int32 (G, B) in [0, 2**BITS)."""
    codes = packed_GP
    if BITS <= 4:
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), [G, B * BITS // 4])
    if BITS <= 2:
        codes = tl.reshape(tl.join(codes & 3, codes >> 2), [G, B * BITS // 2])
    if BITS <= 1:
        codes = tl.reshape(tl.join(codes & 1, codes >> 1), [G, B])
    return codes.to(tl.int32)


@triton.jit
def max_bits(x_GB):
    """The largest |x| of each row of float32, as its bit pattern: finite < infinity < NaN."""
    return tl.reduce(float_bits(x_GB) & 0x7FFFFFFF, 1, _maximum)


@triton.jit
def tree_sum(x_GB, G: tl.constexpr, B: tl.constexpr):
    """Row sums (G,) of float32, adjacent pairs first."""
    total = x_GB
    width: tl.constexpr = B
    for i in tl.static_range(12):
        if (width >> i) > 1:
            even, odd = tl.split(tl.reshape(total, [G, width >> (i + 1), 2]))
            total = even + odd
    return tl.reshape(total, [G])


@triton.jit
def hadamard(x_GB, SIZE: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """H x for each run of SIZE elements, by butterflies at distance 1, 2, 4, ...; not normalised."""
    runs: tl.constexpr = G * B // SIZE
    x_RS = tl.reshape(x_GB, [runs, SIZE])
    lane_RS = tl.broadcast_to(tl.arange(0, SIZE)[None, :], [runs, SIZE])
    for i in tl.static_range(10):
        if (SIZE >> i) > 1:
            other_RS = tl.gather(x_RS, lane_RS ^ (1 << i), 1)
            x_RS = tl.where((lane_RS & (1 << i)) == 0, x_RS + other_RS, other_RS - x_RS)
    return tl.reshape(x_RS, [G, B])
