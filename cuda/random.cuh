// The 16 random bits of each of 8 elements: one Philox call.
#pragma once

#include "bits.cuh"
#include "numerics.h"

namespace commq::cuda {

struct Draw {
  Philox philox;

  // eighth: number of the first of the 8 elements in the global numbering, divided by 8.
  __device__ __forceinline__ Draw(const Random& random, uint64_t eighth)
      : philox(eighth, random.step, random.keys) {}

  __device__ __forceinline__ uint32_t half_word(int j) const {
    const uint32_t word = philox.words[j / 2];
    return j % 2 ? word >> 16 : word & 0xFFFF;
  }

  // t + (r + 1/2) * 2**-16, rounded once. Below 2**24 the bits n of a float32 are n * 2**-149, subnormal or not: that
  // of n = r * 256 + 128, times 2**125, is what is added.
  __device__ __forceinline__ float added_to(float t, int j) const {
    const uint32_t bits = __byte_perm(philox.words[j / 2], 0x00000080u, j % 2 ? 0x7324 : 0x7104);
    return __fmaf_rn(as_float(bits), 0x1p125f, t);
  }
};

}  // namespace commq::cuda
