// CUDA C++ as far as the kernels of cuda/ use it, for a host compiler: see emulator.cpp.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one CTA runs at a time

using std::max;
using std::min;

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

extern dim3 threadIdx, blockIdx, blockDim;
uint32_t exchange_in_warp(uint32_t word, int distance);
void wait_for_block();
void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel);

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline void __syncthreads() { wait_for_block(); }
inline void __syncwarp() { exchange_in_warp(0, 1); }
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t word, int distance) { return exchange_in_warp(word, distance); }
inline float __shfl_xor_sync(uint32_t, float x, int distance) {
  return __uint_as_float(exchange_in_warp(__float_as_uint(x), distance));
}
inline bool __all_sync(uint32_t, bool predicate) {
  uint32_t all = predicate;
  for (int distance = 1; distance < 32; distance *= 2) all &= exchange_in_warp(all, distance);
  return all;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rd(float a, float b) {
  const float sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);  // exact: a + b == sum + error
  return error < 0 ? std::nextafterf(sum, -INFINITY) : sum;
}
inline unsigned __float2uint_ru(float x) { return static_cast<unsigned>(std::ceil(x)); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t word = 0;
  for (int k = 0; k < 4; ++k) word |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * k & 7) & 255) << 8 * k;
  return word;
}

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half low, high;
};
struct __nv_bfloat162 {
  uint16_t low, high;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) {
  _Float16 half;
  memcpy(&half, &x, 2);
  return static_cast<float>(half);
}
inline __half __float2half_rn(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  __half rounded;
  memcpy(&rounded, &half, 2);
  return x != x ? __half{0x7FFF} : rounded;
}
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline uint16_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {bf16_bits(low), bf16_bits(high)}; }
