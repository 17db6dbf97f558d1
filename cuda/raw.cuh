// Raw formats: the plain elements fp32, bf16 or fp16, NaN made canonical. Rows may start at any byte.
#pragma once

#include "random.cuh"
#include "memory.cuh"

namespace commq::cuda {

__device__ __forceinline__ Dtype raw_dtype(FormatId format) {
  return format == FormatId::fp32 ? Dtype::f32 : format == FormatId::bf16 ? Dtype::bf16 : Dtype::f16;
}

// r: 16 random bits. Finite numbers stay finite, infinities stay as they are.
__device__ __forceinline__ uint32_t stochastic_bf16(float x, uint32_t r) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t rounded = finite(x) ? min(magnitude + r, 0x7F7FFFFFu) : magnitude;
  return rounded >> 16 | (bits_of(x) >> 16 & 0x8000u);
}

// Random bits of element n alone; rows of raw formats may start in the middle of a counter's eight.
__device__ __forceinline__ uint32_t random_half_word(const Random& random, int64_t n) {
  const Draw draw(random, static_cast<uint64_t>(n) / 8);
  uint32_t half_word = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (n % 8 == j) half_word = draw.half_word(j);
  return half_word;
}

// The numbers that the wire will carry for x, as float32: rounded, canonical NaN.
__device__ __forceinline__ void round_raw(float (&x)[V], FormatId format, const Random& random, int64_t n) {
  if (format == FormatId::bf16 && random.stochastic && n % 8 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Draw draw(random, static_cast<uint64_t>(n) / 8 + half);
#pragma unroll
      for (int j = 8 * half; j < 8 * half + 8; ++j) x[j] = as_float(stochastic_bf16(x[j], draw.half_word(j % 8)) << 16);
    }
  } else if (format == FormatId::bf16 && random.stochastic) {
#pragma unroll 1
    for (int j = 0; j < V; ++j) {
      // A loop with one copy of Philox; x[j] by selection, so that x stays in registers.
      const uint32_t r = random_half_word(random, n + j);
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (k == j) x[k] = as_float(stochastic_bf16(x[k], r) << 16);
    }
  } else if (format == FormatId::bf16) {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = low_bf16(bf16_pair(x[j], 0.0f));
  } else if (format == FormatId::fp16) {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __half2float(__float2half_rn(x[j]));
  }
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (x[j] != x[j]) x[j] = as_float(0x7FC00000u);
}

__device__ __forceinline__ uint32_t raw_bits(float rounded, FormatId format) {
  if (format == FormatId::fp32) return bits_of(rounded);
  if (format == FormatId::bf16) return bits_of(rounded) >> 16;
  return rounded != rounded ? 0x7E00 : __half_as_ushort(__float2half_rn(rounded));
}

// Write rounded numbers as elements i, i + 1, ... (count of them) of a row.
__device__ __forceinline__ void store_raw(uint8_t* row, FormatId format, int64_t i, int count, bool aligned,
                                          const float (&rounded)[V]) {
  uint32_t bits[V];
#pragma unroll
  for (int j = 0; j < V; ++j) bits[j] = raw_bits(rounded[j], format);
  const int bytes = format == FormatId::fp32 ? 4 : 2;
  if (aligned && count == V) {
    uint4* quads = reinterpret_cast<uint4*>(row + i * bytes);
    if (bytes == 4) {
#pragma unroll
      for (int j = 0; j < V; j += 4) quads[j / 4] = make_uint4(bits[j], bits[j + 1], bits[j + 2], bits[j + 3]);
    } else {
#pragma unroll
      for (int j = 0; j < V; j += 8)
        quads[j / 8] = make_uint4(bits[j] | bits[j + 1] << 16, bits[j + 2] | bits[j + 3] << 16,
                                  bits[j + 4] | bits[j + 5] << 16, bits[j + 6] | bits[j + 7] << 16);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j)
    for (int b = 0; b < bytes; ++b)
      if (j < count) row[(i + j) * bytes + b] = static_cast<uint8_t>(bits[j] >> (8 * b));
}

// Elements i, i + 1, ... (count of them) of a row; the others 0.
__device__ __forceinline__ void load_raw(const uint8_t* row, FormatId format, int64_t i, int count, bool aligned,
                                         float (&x)[V]) {
  if (aligned && count == V) {
    load(row, raw_dtype(format), Place{i, V, true}, x);
    return;
  }
  const int bytes = format == FormatId::fp32 ? 4 : 2;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    uint32_t bits = 0;
    for (int b = 0; b < bytes; ++b)
      if (j < count) bits |= static_cast<uint32_t>(row[(i + j) * bytes + b]) << (8 * b);
    x[j] = format == FormatId::fp32   ? as_float(bits)
           : format == FormatId::bf16 ? as_float(bits << 16)
                                      : __half2float(__ushort_as_half(bits));
  }
}

}  // namespace commq::cuda
