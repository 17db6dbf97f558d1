// Words on the device: bit casts, rounding by adding a large number, and maxima that see a NaN.
#pragma once

#include <cfloat>
#include <cstdint>

namespace commq::cuda {

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2**23: t + MAGIC has the integer nearest to t in its low bits
constexpr uint32_t MAGIC_BITS = 0x4B400000u;
constexpr float LIFT = 0x1p64f;  // tiny blocks are multiplied by this before any division

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= FLT_MAX; }

// The larger one; NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// MAGIC_BITS + t rounded to the nearest integer, half to even; |t| < 2**22.
__device__ __forceinline__ uint32_t nearest_integer(float t) { return bits_of(__fadd_rn(t, MAGIC)); }

// MAGIC_BITS + the largest integer <= t; |t| < 2**22.
__device__ __forceinline__ uint32_t floor_integer(float t) { return bits_of(__fadd_rd(t, MAGIC)); }

// word & mask ^ bits in one instruction: the compiler makes it two, to share the first among several masks.
__device__ __forceinline__ uint32_t masked_xor(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// a, b, c, d below 256: a | b << 8 | c << 16 | d << 24, from the low bytes of the words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

}  // namespace commq::cuda
