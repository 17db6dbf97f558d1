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

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, const Offsets& at, bool aligned) {
    codes = load_codes<Codec::BITS>(row + at.codes, aligned);
    scale.template load<Codec::FLOAT>(layout.scale, row + at.scale, row + at.group, aligned);
  }

  __device__ __forceinline__ void decode(const Layout& layout, float (&x)[V]) const {
    decode_block<Codec>(codes, scale.template value<Codec::FLOAT>(layout.scale), layout.scale, x);
  }

  __device__ __forceinline__ void add(const Layout& layout, float (&x)[V]) const {
    float message[V];
    if constexpr (std::is_same_v<Codec, Sign>) {  // +-scale is exact: the multiply-add rounds once, as the sum does
      Codec::values(codes.halves[0], eight<0>(message));
      Codec::values(codes.halves[1], eight<1>(message));
      const float magnitude = scale.template value<false>(layout.scale);
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = __fmaf_rn(message[j], magnitude, x[j]);
    } else {
      decode(layout, message);
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = __fadd_rn(x[j], message[j]);
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

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, const Offsets& at, bool aligned) {
    codes = load_levels(row + at.codes, code_bits(layout.format), aligned);
    scale.template load<false>(layout.scale, row + at.scale, row + at.group, aligned);
  }

  __device__ __forceinline__ void decode(const Layout& layout, float (&x)[V]) const {
    decode_block<LevelCodes<Hop>>(codes, scale.template value<false>(layout.scale), layout.scale, x);
  }
};

template <>
struct Source<Raw> {
  float elements[V];

  static __device__ __forceinline__ Offsets offsets(const Layout& layout, int64_t i) { return {layout, i, 8}; }

  __device__ __forceinline__ void load(const uint8_t* row, const Layout& layout, const Offsets& at, bool aligned) {
    const int64_t i = at.i, left = layout.chunk_numel - i;
    load_raw(row, layout.format, i, left < V ? static_cast<int>(left) : V, aligned, elements);
  }

  __device__ __forceinline__ void decode(const Layout&, float (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = elements[j];
  }

  __device__ __forceinline__ void add(const Layout&, float (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fadd_rn(x[j], elements[j]);
  }
};

}  // namespace commq::cuda
