// Codes that index a table of levels, and the scales that follow the codes. In registers a code takes 4 bits; on the
// wire as many as the format says. The table stands in shared memory: 16 levels in 16 banks.
#pragma once

#include "encode_block.cuh"

namespace commq::cuda {

// Hop 0: what a kernel encodes a bucket in, or the messages it reads; 1: its answer. Each has a table of its own.
template <int Hop>
struct LevelCodes {
  static constexpr int BITS = 0;  // the layout knows
  static constexpr bool FLOAT = false;
  static constexpr float MAX_CODE = 1.0f, VALUE_SCALE = 1.0f;

  __device__ static __forceinline__ float* table() {
    __shared__ float levels[16];
    return levels;
  }

  // Every thread of the CTA takes part, before anything looks at the table.
  __device__ static __forceinline__ void prepare(const Layout& layout) {
    if (threadIdx.x < 16) table()[threadIdx.x] = layout.levels.levels[threadIdx.x];
    __syncthreads();
  }

  __device__ static __forceinline__ void values(Packed codes, float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = table()[codes.low >> (4 * j) & 15];
  }
};

template <class Codec>
constexpr bool IS_LEVELS = false;
template <int Hop>
constexpr bool IS_LEVELS<LevelCodes<Hop>> = true;

// Codes of 16 elements between 4 bits each and `bits` each: 2 * bits bytes on the wire.
__device__ __forceinline__ Codes load_levels(const uint8_t* at, int bits, bool aligned) {
  if (aligned && bits == 4) return load_codes<4>(at, true);
  uint64_t word = 0;
  if (aligned)
    for (int k = 0; k < bits; ++k) word |= static_cast<uint64_t>(reinterpret_cast<const uint16_t*>(at)[k]) << (16 * k);
  else
    for (int k = 0; k < 2 * bits; ++k) word |= static_cast<uint64_t>(at[k]) << (8 * k);
  if (bits == 4) return {{{static_cast<uint32_t>(word), 0}, {static_cast<uint32_t>(word >> 32), 0}}};
  const uint32_t ones = (1u << bits) - 1;
  Codes codes{};
#pragma unroll
  for (int j = 0; j < V; ++j)
    codes.halves[j / 8].low |= (static_cast<uint32_t>(word >> (bits * j)) & ones) << (4 * (j % 8));
  return codes;
}

__device__ __forceinline__ void store_levels(uint8_t* at, int bits, bool aligned, const Codes& codes) {
  if (bits == 4) return store_codes<4>(at, aligned, codes);
  uint64_t word = 0;
#pragma unroll
  for (int j = 0; j < V; ++j)
    word |= static_cast<uint64_t>(codes.halves[j / 8].low >> (4 * (j % 8)) & 15) << (bits * j);
  if (aligned)
    for (int k = 0; k < bits; ++k) reinterpret_cast<uint16_t*>(at)[k] = static_cast<uint16_t>(word >> (16 * k));
  else
    for (int k = 0; k < 2 * bits; ++k) at[k] = static_cast<uint8_t>(word >> (8 * k));
}

// How many of edges[0 .. count - 2] are at or below t.
__device__ __forceinline__ uint32_t count_below(float t, const float* edges, int count) {
  uint32_t below = 0;
#pragma unroll
  for (int k = 0; k < 15; ++k)
    if (k + 1 < count) below += t >= edges[k];
  return below;
}

template <class Codec>
__device__ __forceinline__ uint32_t random_level(float t, const Levels& levels, const Draw& draw, int j) {
  const uint32_t below = count_below(t, levels.levels + 1, levels.count);
  const uint32_t last = static_cast<uint32_t>(levels.count - 1);
  const float low = Codec::table()[below], step = __fadd_rn(Codec::table()[min(below + 1, last)], -low);
  const float up = step > 0.0f ? __fdiv_rn(__fadd_rn(t, -low), step) : 0.0f;
  const int code = static_cast<int>(below + floor_integer(draw.added_to(up, j)) - MAGIC_BITS);
  return static_cast<uint32_t>(min(max(code, 0), static_cast<int>(last)));
}

// Sum over a block, adjacent pairs first. `part` is overwritten.
__device__ __forceinline__ float block_sum(float (&part)[V], int threads, Meeting& meeting) {
#pragma unroll
  for (int half = 1; half < V; half *= 2)
#pragma unroll
    for (int j = 0; j < V; j += 2 * half) part[j] = __fadd_rn(part[j], part[j + half]);
  return reduce_sum(part[0], threads, meeting);
}

// The nearest levels of h / (spread * rms), and the scale that suits them.
template <class Codec>
__device__ __forceinline__ BlockScale fit_levels(const float (&h)[V], const Layout& layout, BlockMeetings& meetings,
                                                 Codes& codes) {
  const Levels& levels = layout.levels;
  const int threads = layout.block / V;
  const float amax = reduce_max(max_magnitude(h), threads, meetings.max);
  const bool marked = !finite(amax);
  const int exponent = marked ? 1 : min(max(static_cast<int>(bits_of(amax) >> 23), 1), 253);
  const float down = as_float(static_cast<uint32_t>(254 - exponent) << 23);
  float y[V], part[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    y[j] = marked ? 0.0f : __fmul_rn(h[j], down);
    part[j] = __fmul_rn(y[j], y[j]);
  }
  const float energy = block_sum(part, threads, meetings.sum);
  const float factor = energy > 0.0f ? __fsqrt_rn(__fdiv_rn(levels.spread, energy)) : 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const uint32_t code = count_below(__fmul_rn(y[j], factor), levels.edges, levels.count);
    codes.halves[j / 8].low |= code << (4 * (j % 8));
    part[j] = __fmul_rn(y[j], Codec::table()[code]);
  }
  const float product = block_sum(part, threads, meetings.product);
  float over = energy, under = product;
  if (levels.fit == FitId::least_squares) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float level = Codec::table()[codes.halves[j / 8].low >> (4 * (j % 8)) & 15];
      part[j] = __fmul_rn(level, level);
    }
    over = product, under = block_sum(part, threads, meetings.square);
  }
  const float up = as_float(static_cast<uint32_t>(exponent) << 23);
  const float s = over > 0.0f ? fminf(__fmul_rn(__fdiv_rn(over, under), up), FLT_MAX) : 0.0f;
  return plain_scale(layout.scale, s, marked, true);
}

template <class Codec>
__device__ __forceinline__ Sent encode_levels(const float (&h)[V], const Layout& layout, const Random& random,
                                              const Blocks& blocks, const Target& to, BlockMeetings& meetings) {
  Codes codes{};
  BlockScale scale;
  if (layout.levels.fit != FitId::largest) {
    scale = fit_levels<Codec>(h, layout, meetings, codes);
  } else {
    scale = find_scale<Codec>(h, layout, random, blocks, to, meetings);
    float t[V];
    scale_down<Codec>(h, scale, layout.scale, t);
    if (random.stochastic) {
      const uint64_t eighth = counter(layout, blocks, to);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Draw draw(random, eighth + half);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          codes.halves[half].low |= random_level<Codec>(t[8 * half + j], layout.levels, draw, j) << (4 * j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j)
        codes.halves[j / 8].low |= count_below(t[j], layout.levels.edges, layout.levels.count) << (4 * (j % 8));
    }
  }
  if (to.inside) {
    const int bits = code_bits(layout.format), bytes = scale_bytes(layout.scale);
    store_levels(to.row + to.i / 8 * bits, bits, to.aligned, codes);
    if ((to.i & (layout.block - 1)) == 0)
      store_bytes(to.row + layout.scales_offset + (to.i >> log2_of(layout.block)) * bytes, scale.code, bytes,
                  to.aligned);
  }
  return {codes, scale.value};
}

// Encode the CTA's blocks in any format with blocks. Every thread takes part.
template <class Codec>
__device__ __forceinline__ Sent encode_any(const float (&h)[V], const Layout& layout, const Random& random,
                                           const Blocks& blocks, const Target& to, BlockMeetings& meetings) {
  if constexpr (IS_LEVELS<Codec>)
    return encode_levels<Codec>(h, layout, random, blocks, to, meetings);
  else
    return encode_block<Codec>(h, layout, random, blocks, to, meetings);
}

}  // namespace commq::cuda
