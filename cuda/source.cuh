// A thread's elements of one message: what is loaded first (so that several loads are under way) and then decoded.
#pragma once

#include "levels.cuh"
#include "raw.cuh"

namespace commq::cuda {

// Where a thread's elements, their scale and their group's scale stand within every row.
struct Offsets {
  int64_t i, codes, scale, group;

  __device__ __forceinline__ Offsets(const Layout& layout, int64_t i, int bits)
      : i(i),
        codes(i / 8 * bits),
        scale(WireScale::offset(layout, i)),
        group(WireScale::group_offset(layout, i)) {}
};

template <class Codec>
struct Source {
  Codes codes;
  WireScale scale;

  static __device__ __forceinline__ Offsets offsets(const Layout& layout, int64_t i) {
    return {layout, i, Codec::BITS};
  }

  // kind: that of the layout's scales, as a constant where it is known.
  __device__ __forceinline__ void load(const uint8_t* row, const Layout&, ScaleId kind, const Offsets& at,
                                       bool aligned) {
    codes = load_codes<Codec::BITS>(row + at.codes, aligned);
    scale.template load<Codec::FLOAT>(kind, row + at.scale, row + at.group, aligned);
  }

  __device__ __forceinline__ void decode(ScaleId kind, float (&x)[V]) const {
    const float magnitude = scale.template value<Codec::FLOAT>(kind);
    if constexpr (std::is_same_v<Codec, Sign>) {
      const uint32_t word = codes.halves[0].low | codes.halves[1].low << 8;
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = word >> j & 1 ? magnitude : -magnitude;
    } else {
      decode_block<Codec>(codes, magnitude, kind, x);
    }
  }
};

template <int Hop>
struct Source<LevelCodes<Hop>> {
  Codes codes;
  WireScale scale;

  static __device__ __forceinline__ Offsets offsets(const Layout& layout, int64_t i) {
    return {layout, i, code_bits(layout.format)};
  }

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, ScaleId kind, const Offsets& at,
                                       bool aligned) {
    codes = load_levels(row + at.codes, code_bits(layout.format), aligned);
    scale.template load<false>(kind, row + at.scale, row + at.group, aligned);
  }

  __device__ __forceinline__ void decode(ScaleId kind, float (&x)[V]) const {
    decode_block<LevelCodes<Hop>>(codes, scale.template value<false>(kind), kind, x);
  }
};

template <>
struct Source<Raw> {
  float elements[V];

  static __device__ __forceinline__ Offsets offsets(const Layout& layout, int64_t i) { return {layout, i, 8}; }

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, ScaleId, const Offsets& at,
                                       bool aligned) {
    const int64_t i = at.i, left = layout.chunk_numel - i;
    load_raw(row, layout.format, i, left < V ? static_cast<int>(left) : V, aligned, elements);
  }

  __device__ __forceinline__ void decode(ScaleId, float (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = elements[j];
  }
};

}  // namespace commq::cuda
