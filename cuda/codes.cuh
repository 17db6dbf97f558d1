// One struct for each kind of code: 8 scaled numbers t to packed codes, and packed codes to 8 values.
//
// Packed holds the codes of 8 consecutive elements, the first in the lowest bits. `values` gives code * (1 / max_code),
// rounded once, for integers and signs; for floats the codes divided by VALUE_SCALE, an exact power of two that the
// caller multiplies back together with 1 / max_code. |t| is at most MAX_CODE and a few rounding errors of it (more for
// power-of-two scales); codes are clamped where that could reach the next one.
#pragma once

#include <cuda_fp16.h>

#include "random.cuh"

namespace commq::cuda {

struct Packed {
  uint32_t low;   // 8 codes of up to 4 bits, or the first 4 codes of 8 bits
  uint32_t high;  // the last 4 codes of 8 bits
};

// The values u * unit - offset of two unsigned fields u, `shift` bits up in the halves of `pair` and below 1024 there.
// Such bits are subnormal float16 numbers, u * 2**(shift - 24). The multiply-add's product is exact, and so is `offset`,
// a power of two times `unit`: the one rounding is that of code * unit.
__device__ __forceinline__ void pair_values(uint32_t pair, int shift, float unit, float offset, float& a, float& b) {
  const float factor = unit * static_cast<float>(1 << (24 - shift));
  a = __fmaf_rn(__half2float(__ushort_as_half(pair & 0xFFFF)), factor, -offset);
  b = __fmaf_rn(__half2float(__ushort_as_half(pair >> 16)), factor, -offset);
}

struct Int8 {
  static constexpr int BITS = 8;
  static constexpr bool FLOAT = false;
  static constexpr float MAX_CODE = 127.0f;

  __device__ static __forceinline__ Packed pack(const uint32_t (&q)[8]) {
    return {low_bytes(q[0], q[1], q[2], q[3]), low_bytes(q[4], q[5], q[6], q[7])};
  }

  __device__ static __forceinline__ Packed nearest(const float (&t)[8]) {
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = nearest_integer(t[j]);
    return pack(q);
  }

  __device__ static __forceinline__ Packed stochastic(const float (&t)[8], const Draw& draw) {
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float u = draw.added_to(t[j], j);
      q[j] = floor_integer(fminf(fmaxf(u, -MAX_CODE), MAX_CODE));
    }
    return pack(q);
  }

  __device__ static __forceinline__ void values(Packed codes, float (&v)[8]) {
    // u = code + 128, 16 bits up: below 2**24 the bits n of a float32 are n * 2**-149, subnormal or not.
    constexpr float UNIT = 1.0f / MAX_CODE;
    const uint32_t word[2] = {codes.low ^ 0x80808080u, codes.high ^ 0x80808080u};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float u = as_float(__byte_perm(word[j / 4], 0, 0x4044 | (j % 4) << 8));
      v[j] = __fmaf_rn(u, UNIT * 0x1p127f * 64.0f, -128.0f * UNIT);
    }
  }
};

// Two's complement integers of 4 or 2 bits.
template <int Bits>
struct SmallInt {
  static constexpr int BITS = Bits;
  static constexpr bool FLOAT = false;
  static constexpr float MAX_CODE = Bits == 4 ? 7.0f : 1.0f;
  static constexpr uint32_t ONES = Bits == 4 ? 0x11111111u : 0x5555u;
  static constexpr uint32_t BIAS = 1u << (Bits - 1);

  // The sum of (MAGIC_BITS + q) << (Bits * j), made one of the unsigned q + BIAS, whose top bits are then flipped.
  __device__ static __forceinline__ Packed pack(const uint32_t (&q)[8]) {
    uint32_t sum = q[7];
#pragma unroll
    for (int j = 6; j >= 0; --j) sum = (sum << Bits) + q[j];
    return {(sum - MAGIC_BITS * ONES + BIAS * ONES) ^ (BIAS * ONES), 0};
  }

  __device__ static __forceinline__ Packed nearest(const float (&t)[8]) {
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = nearest_integer(t[j]);
    return pack(q);
  }

  __device__ static __forceinline__ Packed stochastic(const float (&t)[8], const Draw& draw) {
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = floor_integer(draw.added_to(t[j], j));
    return pack(q);
  }

  __device__ static __forceinline__ void values(Packed codes, float (&v)[8]) {
    constexpr float UNIT = 1.0f / MAX_CODE;
    const uint32_t word = codes.low;
    // Elements j and j + 4 stand at the same bits of the two halves.
    const uint32_t pairs[2] = {Bits == 4 ? word : __byte_perm(word, 0, 0x4140), word >> 8};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int shift = Bits == 4 ? 4 * (j % 2) : 2 * j;
      const uint32_t mask = ((1u << Bits) - 1) * 0x00010001u << shift, bias = BIAS * 0x00010001u << shift;
      const uint32_t pair = masked_xor(pairs[Bits == 4 ? j / 2 : 0], mask, bias);
      pair_values(pair, shift, UNIT, BIAS * UNIT, v[j], v[j + 4]);
    }
  }
};

using Int4 = SmallInt<4>;
using Int2 = SmallInt<2>;

struct Sign {
  static constexpr int BITS = 1;
  static constexpr bool FLOAT = false;
  static constexpr float MAX_CODE = 1.0f;

  // t is the number itself here, not yet scaled. Adding 0 turns -0, whose code is that of 0, into +0.
  __device__ static __forceinline__ Packed nearest(const float (&t)[8]) {
    uint32_t negative = 0;
#pragma unroll
    for (int j = 7; j >= 0; --j) negative = __funnelshift_l(bits_of(__fadd_rn(t[j], 0.0f)), negative, 1);
    return {~negative, 0};
  }

  __device__ static __forceinline__ Packed stochastic(const float (&t)[8], const Draw& draw) {
    uint32_t codes = 0;
#pragma unroll
    for (int j = 7; j >= 0; --j) {
      const float half = __fadd_rn(__fmul_rn(t[j], 0.5f), 0.5f);
      codes = (codes << 1) + floor_integer(draw.added_to(half, j));
    }
    return {codes - MAGIC_BITS * 0xFFu, 0};
  }

  __device__ static __forceinline__ void values(Packed codes, float (&v)[8]) {
    const uint32_t byte = codes.low & 0xFF, pairs = byte | byte << 12;  // elements j and j + 4 at bits j and j + 16
#pragma unroll
    for (int j = 0; j < 4; ++j) pair_values(pairs & 0x00010001u << j, j, 2.0f, 1.0f, v[j], v[j + 4]);
  }
};

// Pattern of t in a float of few bits, without its sign: k = |t| / ulp rounded to an integer, counted from the
// first pattern of t's binade; a carry out of the mantissa steps the exponent by itself.
template <int Exponent, int Mantissa>
struct SmallFloat {
  static constexpr uint32_t LOWEST = (127 + 2 - (1 << (Exponent - 1))) << 23;  // exponent bits of the smallest normal

  __device__ static __forceinline__ uint32_t binade(float t) {
    const uint32_t bits = bits_of(t) & 0x7F800000u;
    return bits > LOWEST ? bits : LOWEST;
  }

  __device__ static __forceinline__ uint32_t first(uint32_t binade) { return (binade - LOWEST) >> (23 - Mantissa); }

  __device__ static __forceinline__ uint32_t nearest(float t) {
    const uint32_t bits = binade(t);
    const uint32_t magic = bits + ((23 - Mantissa) << 23) + 0x400000u;  // 1.5 * 2**23 ulps
    return first(bits) + (bits_of(__fadd_rn(fabsf(t), as_float(magic))) - magic);
  }

  __device__ static __forceinline__ uint32_t stochastic(float t, const Draw& draw, int j) {
    const uint32_t bits = binade(t);
    const float ulps = __fmul_rn(fabsf(t), as_float(((254u + Mantissa) << 23) - bits));  // exact
    return first(bits) + (floor_integer(draw.added_to(ulps, j)) - MAGIC_BITS);
  }
};

// e4m3 and e5m2. From sm_89 on one instruction converts two numbers, by the same rules: nearest even, saturating.
template <int Mantissa>
struct Fp8 {
  static constexpr int BITS = 8;
  static constexpr bool FLOAT = true;
  static constexpr float MAX_CODE = Mantissa == 3 ? 448.0f : 57344.0f, VALUE_SCALE = 1.0f;
  static constexpr uint32_t TOP = Mantissa == 3 ? 0x7E : 0x7B;
  using Float = SmallFloat<7 - Mantissa, Mantissa>;

  __device__ static __forceinline__ uint32_t with_sign(uint32_t magnitude, float t) {
    return min(magnitude, TOP) | (bits_of(t) >> 24 & 0x80);
  }

  __device__ static __forceinline__ Packed nearest(const float (&t)[8]) {
#if __CUDA_ARCH__ >= 890
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint16_t pair;
      if constexpr (Mantissa == 3)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(t[2 * j + 1]), "f"(t[2 * j]));
      else
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(t[2 * j + 1]), "f"(t[2 * j]));
      pairs[j] = pair;
    }
    return {__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410)};
#else
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = with_sign(Float::nearest(t[j]), t[j]);
    return Int8::pack(q);
#endif
  }

  __device__ static __forceinline__ Packed stochastic(const float (&t)[8], const Draw& draw) {
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = with_sign(Float::stochastic(t[j], draw, j), t[j]);
    return Int8::pack(q);
  }

  // The high bytes of fp16 are e5m2; e4m3's value is that of the same bits moved into a float32, times 2**120.
  __device__ static __forceinline__ float value(uint32_t code) {
    if constexpr (Mantissa == 2) return __half2float(__ushort_as_half(code << 8));
    const float magnitude = __fmul_rn(as_float((code & 0x7F) << 20), 0x1p120f);
    return as_float(bits_of((code & 0x7F) == 0x7F ? as_float(0x7FC00000u) : magnitude) | (code & 0x80) << 24);
  }

  __device__ static __forceinline__ void values(Packed codes, float (&v)[8]) {
    const uint32_t word[2] = {codes.low, codes.high};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t pair = word[j / 2] >> (16 * (j % 2)) & 0xFFFF;
#if __CUDA_ARCH__ >= 890
      uint32_t halves;
      if constexpr (Mantissa == 3)
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
      else
        halves = __byte_perm(pair, 0, 0x1404);
      v[2 * j] = __half2float(__ushort_as_half(halves & 0xFFFF));
      v[2 * j + 1] = __half2float(__ushort_as_half(halves >> 16));
#else
      v[2 * j] = value(pair & 0xFF);
      v[2 * j + 1] = value(pair >> 8);
#endif
    }
  }
};

using E4M3 = Fp8<3>;
using E5M2 = Fp8<2>;

struct E2M1 {
  static constexpr int BITS = 4;
  static constexpr bool FLOAT = true;
  static constexpr float MAX_CODE = 6.0f, VALUE_SCALE = 0x1p14f;
  using Float = SmallFloat<2, 1>;

  __device__ static __forceinline__ uint32_t with_sign(uint32_t magnitude, float t) {
    return min(magnitude, 7u) | (bits_of(t) >> 28 & 8);
  }

  __device__ static __forceinline__ Packed nearest(const float (&t)[8]) {
    uint32_t codes = 0;
#pragma unroll
    for (int j = 7; j >= 0; --j) codes = (codes << 4) + with_sign(Float::nearest(t[j]), t[j]);
    return {codes, 0};
  }

  __device__ static __forceinline__ Packed stochastic(const float (&t)[8], const Draw& draw) {
    uint32_t codes = 0;
#pragma unroll
    for (int j = 7; j >= 0; --j) codes = (codes << 4) + with_sign(Float::stochastic(t[j], draw, j), t[j]);
    return {codes, 0};
  }

  // Moved into fp16's sign and exponent, subnormals included, e2m1 is 2**-14 times its value.
  __device__ static __forceinline__ void values(Packed codes, float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t nibbles = codes.low >> (4 * j);  // elements j and j + 4 in the low bits of its halves
      const uint32_t halves = (nibbles << 9 & 0x0E000E00u) | (nibbles << 12 & 0x80008000u);
      v[j] = __half2float(__ushort_as_half(halves & 0xFFFF));
      v[j + 4] = __half2float(__ushort_as_half(halves >> 16));
    }
  }
};

}  // namespace commq::cuda
