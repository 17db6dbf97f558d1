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
// Returns whether `usual` holds of the parts of all warps of the CTA, or, if threads <= 32, of the results in the warp.
template <class Op, class Usual>
__device__ __forceinline__ bool reduce_if(float value, int threads, Meeting& meeting, Usual usual, Op op,
                                          float& result) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    if (threads > distance) value = op(value, __shfl_xor_sync(ALL, value, distance));
  result = value;
  if (threads <= 32) return __all_sync(ALL, usual(value));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = threads / 32;
  if (lane == 0) meeting.warps[warp] = value;
  __syncthreads();
  const bool all_usual = __all_sync(ALL, usual(meeting.warps[lane % WARPS]));
  value = meeting.warps[(warp & -warps) + (lane & (warps - 1))];
  for (int distance = 1; distance < warps; distance *= 2)
    value = op(value, __shfl_xor_sync(ALL, value, distance));
  result = value;
  return all_usual;
}

template <class Op>
__device__ __forceinline__ float reduce(float value, int threads, Meeting& meeting, Op op) {
  reduce_if(value, threads, meeting, [](float) { return true; }, op, value);
  return value;
}

__device__ __forceinline__ float reduce_max(float value, int threads, Meeting& meeting) {
  return reduce(value, threads, meeting, [](float a, float b) { return max_or_nan(a, b); });
}

__device__ __forceinline__ float reduce_sum(float value, int threads, Meeting& meeting) {
  return reduce(value, threads, meeting, [](float a, float b) { return __fadd_rn(a, b); });
}

// |x| of the thread's elements, combined pair by pair.
template <class Op>
__device__ __forceinline__ float fold_magnitudes(const float (&x)[V], Op op) {
  float part[V / 2];
#pragma unroll
  for (int j = 0; j < V / 2; ++j) part[j] = op(fabsf(x[2 * j]), fabsf(x[2 * j + 1]));
#pragma unroll
  for (int half = 1; half < V / 2; half *= 2)
#pragma unroll
    for (int j = 0; j < V / 2; j += 2 * half) part[j] = op(part[j], part[j + half]);
  return part[0];
}

// The thread's largest |x|; NaN if one of them is.
__device__ __forceinline__ float max_magnitude(const float (&x)[V]) {
  return fold_magnitudes(x, [](float a, float b) { return max_or_nan(a, b); });
}

// The sum of the thread's |x|.
__device__ __forceinline__ float sum_magnitudes(const float (&x)[V]) {
  return fold_magnitudes(x, [](float a, float b) { return __fadd_rn(a, b); });
}

}  // namespace commq::cuda
