// What the threads of a block of elements find out together: a maximum or a sum over 1 to 256 threads.
//
// A thread holds 16 elements, so up to 512 elements stay in one warp; larger blocks take up to 8 warps, one CTA, and
// meet in shared memory. Every thread of the CTA must come along, with or without elements.
#pragma once

#include "memory.cuh"

namespace commq::cuda {

constexpr int THREADS = 256;  // of every CTA: V * THREADS elements, the largest block
constexpr int WARPS = THREADS / 32;
constexpr uint32_t ALL = 0xFFFFFFFFu;

// One float for each warp. Every meeting in a kernel has its own, so that none waits for readers of the last one.
struct Meeting {
  float warps[WARPS];
};

// op over `threads` neighbours (a power of two), nearest pairs first, so that a sum is the specification's tree.
template <class Op>
__device__ __forceinline__ float reduce(float value, int threads, Meeting& meeting, Op op) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    if (threads > distance) value = op(value, __shfl_xor_sync(ALL, value, distance));
  if (threads > 32) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = threads / 32;
    if (lane == 0) meeting.warps[warp] = value;
    __syncthreads();
    value = meeting.warps[(warp & -warps) + (lane & (warps - 1))];
    for (int distance = 1; distance < warps; distance *= 2)
      value = op(value, __shfl_xor_sync(ALL, value, distance));
  }
  return value;
}

__device__ __forceinline__ float reduce_max(float value, int threads, Meeting& meeting) {
  return reduce(value, threads, meeting, [](float a, float b) { return max_or_nan(a, b); });
}

__device__ __forceinline__ float reduce_sum(float value, int threads, Meeting& meeting) {
  return reduce(value, threads, meeting, [](float a, float b) { return __fadd_rn(a, b); });
}

__device__ __forceinline__ float max_magnitude(const float (&x)[V]) {
  float top = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) top = max_or_nan(top, fabsf(x[j]));
  return top;
}

}  // namespace commq::cuda
