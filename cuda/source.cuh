// A thread's elements of one message: what is loaded first (so that several loads are under way) and then decoded.
#pragma once

#include "levels.cuh"
#include "raw.cuh"

namespace commq::cuda {

template <class Codec>
struct Source {
  Codes codes;
  WireScale scale;

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, int64_t i, bool aligned) {
    codes = load_codes<Codec::BITS>(row + i / 8 * Codec::BITS, aligned);
    scale.template load<Codec::FLOAT>(row, layout, i, aligned);
  }

  __device__ __forceinline__ void decode(const Layout& layout, float (&x)[V]) const {
    decode_block<Codec>(codes, scale.template value<Codec::FLOAT>(layout.scale), layout.scale, x);
  }
};

template <int Hop>
struct Source<LevelCodes<Hop>> {
  Codes codes;
  WireScale scale;

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, int64_t i, bool aligned) {
    const int bits = code_bits(layout.format);
    codes = load_levels(row + i / 8 * bits, bits, aligned);
    scale.template load<false>(row, layout, i, aligned);
  }

  __device__ __forceinline__ void decode(const Layout& layout, float (&x)[V]) const {
    decode_block<LevelCodes<Hop>>(codes, scale.template value<false>(layout.scale), layout.scale, x);
  }
};

template <>
struct Source<Raw> {
  float elements[V];

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, int64_t i, bool aligned) {
    const int64_t left = layout.chunk_numel - i;
    load_raw(row, layout.format, i, left < V ? static_cast<int>(left) : V, aligned, elements);
  }

  __device__ __forceinline__ void decode(const Layout&, float (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = elements[j];
  }
};

}  // namespace commq::cuda
