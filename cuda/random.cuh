// The 16 random bits of each of 8 elements: one Philox call.
#pragma once

#include "bits.cuh"
#include "numerics.h"

namespace commq::cuda {

struct Draw {
  Philox philox;

  // eighth: number of the first of the 8 elements in the global numbering, divided by 8.
  __device__ __forceinline__ Draw(const Random& random, uint64_t eighth)
      : philox(eighth, random.step, random.seed, random.stream) {}

  __device__ __forceinline__ uint32_t half_word(int j) const {
    const uint32_t word = philox.words[j / 2];
    return j % 2 ? word >> 16 : word & 0xFFFF;
  }

  // (r + 1/2) * 2**-16: r becomes the low bits of a number in [2**23, 2**24); the multiply-add after it is exact.
  __device__ __forceinline__ float offset(int j) const {
    const float r = as_float(__byte_perm(philox.words[j / 2], 0x4B000000u, j % 2 ? 0x7432 : 0x7410));
    return __fmaf_rn(r, 0x1p-16f, -(128.0f - 0x1p-17f));
  }
};

}  // namespace commq::cuda
