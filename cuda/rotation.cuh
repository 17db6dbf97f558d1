// The Walsh-Hadamard transform of runs of 16 to 1024 elements, 16 in each thread, in registers.
//
// Butterflies at distance 1, 2, 4, 8 stay in the thread, up to 256 in the warp; 512 goes through shared memory.
#pragma once

#include "block.cuh"

namespace commq::cuda {

struct Exchange {
  float values[V][THREADS];
};

// y <- H y, not normalised. Every thread of the CTA takes part; the shared memory is free again when it returns.
__device__ __forceinline__ void hadamard(float (&y)[V], int size, Exchange& exchange) {
#pragma unroll
  for (int half = 1; half < V; half *= 2)
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (!(j & half)) {
        const float a = y[j], b = y[j + half];
        y[j] = __fadd_rn(a, b);
        y[j + half] = __fadd_rn(a, -b);
      }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    if (size > V * distance) {
      const float sign = threadIdx.x & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < V; ++j) y[j] = __fmaf_rn(y[j], sign, __shfl_xor_sync(ALL, y[j], distance));  // rounds once
    }
  for (int distance = 32; size > V * distance; distance *= 2) {
    const float sign = threadIdx.x & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) exchange.values[j][threadIdx.x] = y[j];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = __fmaf_rn(y[j], sign, exchange.values[j][threadIdx.x ^ distance]);
    __syncthreads();
  }
}

__device__ __forceinline__ void multiply_signs(float (&y)[V], const float* signs, int size, int64_t i) {
  if (signs == nullptr) return;
  const float4* quads = reinterpret_cast<const float4*>(signs + (i & (size - 1)));
#pragma unroll
  for (int j = 0; j < V; j += 4) {
    const float4 quad = quads[j / 4];
    y[j] = __fmul_rn(y[j], quad.x);
    y[j + 1] = __fmul_rn(y[j + 1], quad.y);
    y[j + 2] = __fmul_rn(y[j + 2], quad.z);
    y[j + 3] = __fmul_rn(y[j + 3], quad.w);
  }
}

// 2**-floor(log2(size) / 2) and 2**-ceil(log2(size) / 2).
__device__ __forceinline__ float rotate_factor(int size) { return as_float((127u - (31 - __clz(size)) / 2) << 23); }
__device__ __forceinline__ float unrotate_factor(int size) { return as_float((127u - (32 - __clz(size)) / 2) << 23); }

__device__ __forceinline__ void rotate(float (&y)[V], int size, const float* signs, int64_t i, Exchange& exchange) {
  multiply_signs(y, signs, size, i);
  hadamard(y, size, exchange);
  const float factor = rotate_factor(size);
#pragma unroll
  for (int j = 0; j < V; ++j) y[j] = __fmul_rn(y[j], factor);
}

__device__ __forceinline__ void unrotate(float (&y)[V], int size, const float* signs, int64_t i, Exchange& exchange) {
  hadamard(y, size, exchange);
  const float factor = unrotate_factor(size);
#pragma unroll
  for (int j = 0; j < V; ++j) y[j] = __fmul_rn(y[j], factor);
  multiply_signs(y, signs, size, i);
}

}  // namespace commq::cuda
