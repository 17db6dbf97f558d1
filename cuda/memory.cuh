// A thread's 16 consecutive elements between memory and registers: 16 bytes at a time where everything is aligned and
// whole, one by one at a tensor's end or at odd addresses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bits.cuh"
#include "codes.cuh"

namespace commq::cuda {

constexpr int V = 16;  // elements of a thread

// The elements [8 * Half, 8 * Half + 8) of a thread's.
template <int Half>
__device__ __forceinline__ float (&eight(float (&x)[V]))[8] {
  return reinterpret_cast<float(&)[8]>(x[8 * Half]);
}

template <int Half>
__device__ __forceinline__ const float (&eight(const float (&x)[V]))[8] {
  return reinterpret_cast<const float(&)[8]>(x[8 * Half]);
}

// The first element of this thread, within a chunk.
__device__ __forceinline__ int64_t thread_element() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
}

// Where a thread's elements stand in a tensor.
struct Place {
  int64_t n;     // the first one
  int valid;     // how many there are, 0..V; the others are padding
  bool aligned;  // pointers and row strides are multiples of 16 bytes

  __device__ __forceinline__ bool whole() const { return aligned && valid == V; }
};

__device__ __forceinline__ Place place_in_row(int64_t length, int64_t i, bool aligned) {
  const int64_t left = length - i;
  return {i, left >= V ? V : left > 0 ? static_cast<int>(left) : 0, aligned};
}

// Elements i, i + 1, ... of chunk number `row` of the whole tensor.
__device__ __forceinline__ Place place(const Layout& layout, int64_t row, int64_t i, bool aligned) {
  const int64_t start = row * layout.chunk_numel;
  Place at = place_in_row(min(layout.numel - start, layout.chunk_numel), i, aligned);
  at.n = start + i;
  return at;
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float load_one(const void* data, Dtype dtype, int64_t n) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[n];
  const uint16_t bits = static_cast<const uint16_t*>(data)[n];
  return dtype == Dtype::bf16 ? as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits));
}

// x[j] = data[n + j] as float32 for j < valid, 0 for the rest.
__device__ __forceinline__ void load(const void* data, Dtype dtype, const Place& at, float (&x)[V]) {
  if (!at.whole()) {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = j < at.valid ? load_one(data, dtype, at.n + j) : 0.0f;
  } else if (dtype == Dtype::f32) {
    const float4* quads = reinterpret_cast<const float4*>(static_cast<const float*>(data) + at.n);
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      const float4 quad = quads[j / 4];
      x[j] = quad.x, x[j + 1] = quad.y, x[j + 2] = quad.z, x[j + 3] = quad.w;
    }
  } else {
    const uint4* quads = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at.n);
    const uint4 a = quads[0], b = quads[1];
    const uint32_t pairs[V / 2] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    if (__builtin_expect(dtype == Dtype::bf16, true)) {  // a branch rather than both, of which one counts
#pragma unroll
      for (int j = 0; j < V / 2; ++j) x[2 * j] = low_bf16(pairs[j]), x[2 * j + 1] = high_bf16(pairs[j]);
    } else {
#pragma unroll
      for (int j = 0; j < V / 2; ++j) {
        x[2 * j] = __half2float(__ushort_as_half(pairs[j] & 0xFFFF));
        x[2 * j + 1] = __half2float(__ushort_as_half(pairs[j] >> 16));
      }
    }
  }
}

__device__ __forceinline__ void store_one(void* data, Dtype dtype, int64_t n, float x) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[n] = x;
  else
    static_cast<uint16_t*>(data)[n] = (dtype == Dtype::bf16 ? bf16_pair(x, 0.0f) : f16_pair(x, 0.0f)) & 0xFFFF;
}

// Write Quads * 16 bytes from each lane of a whole warp, lane after lane. Even and odd lanes first exchange every other
// quad, so that each store covers 32 bytes next to each other for every pair of lanes: whole sectors.
template <int Quads>
__device__ __forceinline__ void store_quads(void* data, const uint32_t (&words)[4 * Quads]) {
  const bool odd = threadIdx.x & 1;
  uint4* quads = reinterpret_cast<uint4*>(data) - (odd ? Quads - 1 : 0);
#pragma unroll
  for (int q = 0; q < Quads; q += 2) {
    uint32_t mine[4], other[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t first = words[4 * q + k], second = words[4 * q + 4 + k];
      mine[k] = odd ? second : first;
      other[k] = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
    }
    const uint4 a = make_uint4(mine[0], mine[1], mine[2], mine[3]);
    const uint4 b = make_uint4(other[0], other[1], other[2], other[3]);
    quads[q] = odd ? b : a;
    quads[Quads + q] = odd ? a : b;
  }
}

// data[n + j] = x[j], rounded to nearest, for j < valid and where bit j of `skip` is not set. All lanes take part.
__device__ __forceinline__ void store(void* data, Dtype dtype, const Place& at, const float (&x)[V],
                                      uint32_t skip = 0) {
  if (!__all_sync(0xFFFFFFFFu, at.whole() && skip == 0)) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j < at.valid && !(skip >> j & 1)) store_one(data, dtype, at.n + j, x[j]);
  } else if (dtype == Dtype::f32) {
    uint32_t words[V];
#pragma unroll
    for (int j = 0; j < V; ++j) words[j] = bits_of(x[j]);
    store_quads<4>(static_cast<float*>(data) + at.n, words);
  } else {
    uint32_t pairs[V / 2];
#pragma unroll
    for (int j = 0; j < V / 2; ++j)
      pairs[j] = dtype == Dtype::bf16 ? bf16_pair(x[2 * j], x[2 * j + 1]) : f16_pair(x[2 * j], x[2 * j + 1]);
    store_quads<2>(static_cast<uint16_t*>(data) + at.n, pairs);
  }
}

// The codes of a thread's elements: V * bits / 8 bytes on the wire.
struct Codes {
  Packed halves[2];

  __device__ __forceinline__ uint8_t byte(int b, int bits) const {
    const Packed& half = halves[b / bits];
    return static_cast<uint8_t>((b % bits < 4 ? half.low : half.high) >> (8 * (b % bits % 4)));
  }
};

template <int Bits>
__device__ __forceinline__ Codes load_codes(const uint8_t* at, bool aligned) {
  if (aligned) {
    if constexpr (Bits == 1) {
      const uint32_t word = *reinterpret_cast<const uint16_t*>(at);
      return {{{word, 0}, {word >> 8, 0}}};
    } else if constexpr (Bits == 2) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(at);
      return {{{word, 0}, {word >> 16, 0}}};
    } else if constexpr (Bits == 4) {
      const uint2 words = *reinterpret_cast<const uint2*>(at);
      return {{{words.x, 0}, {words.y, 0}}};
    } else {
      const uint4 words = *reinterpret_cast<const uint4*>(at);
      return {{{words.x, words.y}, {words.z, words.w}}};
    }
  }
  Codes codes{};
#pragma unroll
  for (int b = 0; b < 2 * Bits; ++b) {
    Packed& half = codes.halves[b / Bits];
    (b % Bits < 4 ? half.low : half.high) |= static_cast<uint32_t>(at[b]) << (8 * (b % Bits % 4));
  }
  return codes;
}

template <int Bits>
__device__ __forceinline__ void store_codes(uint8_t* at, bool aligned, const Codes& codes) {
  const Packed a = codes.halves[0], b = codes.halves[1];
  if (aligned) {
    if constexpr (Bits == 1)
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>((a.low & 0xFF) | b.low << 8);
    else if constexpr (Bits == 2)
      *reinterpret_cast<uint32_t*>(at) = (a.low & 0xFFFF) | b.low << 16;
    else if constexpr (Bits == 4)
      *reinterpret_cast<uint2*>(at) = make_uint2(a.low, b.low);
    else
      *reinterpret_cast<uint4*>(at) = make_uint4(a.low, a.high, b.low, b.high);
  } else {
#pragma unroll
    for (int k = 0; k < 2 * Bits; ++k) at[k] = codes.byte(k, Bits);
  }
}

}  // namespace commq::cuda
