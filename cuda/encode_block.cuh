// The step that all encoders share: 16 float32 numbers in each thread's registers to codes and scales on the wire.
#pragma once

#include <type_traits>

#include "random.cuh"
#include "scale.cuh"

namespace commq::cuda {

// Where the blocks that a thread works on stand.
struct Target {
  uint8_t* row;          // the chunk on the wire
  int64_t i;             // the thread's first element within the chunk
  int64_t n;             // and within the whole tensor
  int64_t table;         // and within the blocks that `Blocks` lists
  bool inside, aligned;  // as in Place
};

struct Sent {
  Codes codes;
  float scale;  // as the receiver decodes it
};

struct BlockMeetings {
  Meeting max, sum;
  Meeting usual_sum;        // of sign
  Meeting product, square;  // of levels
};

// Bytes between the sections are zero. Fewer than 16 after each: the first CTA of a row writes them.
__device__ __forceinline__ void zero_padding(uint8_t* row, const Layout& layout, int bits) {
  if (blockIdx.x != 0 || threadIdx.x >= 48) return;
  const int64_t codes_end = layout.chunk_numel * bits / 8;
  const int64_t chunk_blocks = layout.chunk_numel >> log2_of(layout.block);
  const int64_t scales_end = layout.scales_offset + chunk_blocks * scale_bytes(layout.scale);
  const int64_t groups = layout.group ? layout.chunk_numel >> log2_of(layout.group) : 0;
  const int64_t groups_end = layout.groups_offset + 4 * groups;
  const int section = threadIdx.x / 16;
  const int64_t at = (section == 0 ? codes_end : section == 1 ? scales_end : groups_end) + threadIdx.x % 16;
  const int64_t end = section == 0 ? layout.scales_offset : section == 1 ? layout.groups_offset : layout.chunk_bytes;
  if (at < end) row[at] = 0;
}

// Mean |h| of the first `valid` elements of a block; never overflows, at most amax. h is finite and holds elements
// first, first + 1, ... of the block.
__device__ __forceinline__ float mean_magnitude(const float (&h)[V], float amax, int first, int valid, int threads,
                                                Meeting& meeting) {
  const bool huge = amax >= LIFT;
  const float up = huge ? 0x1p-16f : lift(amax);
  const float down = huge ? 0x1p16f : amax < 1.0f / LIFT ? 1.0f / LIFT : 1.0f;
  float part[V];
#pragma unroll
  for (int j = 0; j < V; ++j) part[j] = first + j < valid ? __fmul_rn(h[j], up) : 0.0f;
  const float total = reduce_sum(sum_magnitudes(part), threads, meeting);
  return fminf(__fmul_rn(__fdiv_rn(total, static_cast<float>(max(valid, 1))), down), amax);
}

// The usual mean of whole blocks, from one reduction; false, for all threads that meet, if one of them needs the rules
// for padding, for numbers that are not finite, or for sums that are tiny or huge. A sum in range says that amax is in
// mean_magnitude's range: it is at least sum / 4096. Rounding keeps order, so a sum of 2**k magnitudes is at most
// 2**k * amax, and the mean at most amax.
__device__ __forceinline__ bool usual_mean(const float (&h)[V], bool whole, int block, Meeting& meeting, float& mean) {
  const float sum = whole ? sum_magnitudes(h) : as_float(0x7FC00000u);
  const auto usual = [](float part) { return part == 0.0f || (part >= 4096.0f / LIFT && part < LIFT / 16.0f); };
  const auto add = [](float a, float b) { return __fadd_rn(a, b); };
  const bool all_usual = reduce_if(sum, block / V, meeting, usual, add, mean);
  mean = __fmul_rn(mean, as_float((127u - log2_of(block)) << 23));
  return all_usual;
}

// Elements of the thread's block that are not padding.
__device__ __forceinline__ int valid_elements(const Layout& layout, const Blocks& blocks, const Target& to) {
  if (!to.inside) return 0;
  if (blocks.valid != nullptr) return blocks.valid[to.table >> log2_of(layout.block)];
  const int64_t left = layout.numel - (to.n & -static_cast<int64_t>(layout.block));
  return static_cast<int>(max(min(left, static_cast<int64_t>(layout.block)), static_cast<int64_t>(0)));
}

// Number of the thread's first element in the numbering of random bits, divided by 8.
__device__ __forceinline__ uint64_t counter(const Layout& layout, const Blocks& blocks, const Target& to) {
  if (blocks.ids == nullptr || !to.inside) return static_cast<uint64_t>(to.n) / 8;
  const int64_t id = blocks.ids[to.table >> log2_of(layout.block)];
  return static_cast<uint64_t>(id * (layout.block / 8) + (to.i & (layout.block - 1)) / 8);
}

template <class Codec>
__device__ __forceinline__ BlockScale find_scale(const float (&h)[V], const Layout& layout, const Random& random,
                                                 const Blocks& blocks, const Target& to, BlockMeetings& meetings) {
  const int threads = layout.block / V;
  if constexpr (std::is_same_v<Codec, Sign>) {
    if (!random.stochastic) {
      const int valid = valid_elements(layout, blocks, to);
      const bool whole = !to.inside || valid == layout.block;
      float mean;
      if (usual_mean(h, whole, layout.block, meetings.usual_sum, mean))
        return plain_scale(layout.scale, mean, false, true);
      const float amax = reduce_max(max_magnitude(h), threads, meetings.max);
      const bool marked = !finite(amax);
      const int first = static_cast<int>(to.i) & (layout.block - 1);
      mean = mean_magnitude(h, marked ? 0.0f : amax, first, valid, threads, meetings.sum);
      return plain_scale(layout.scale, marked ? 0.0f : mean, marked, true);
    }
  }
  const float amax = reduce_max(max_magnitude(h), threads, meetings.max);
  const bool marked = !finite(amax);
  const float magnitude = marked ? 0.0f : amax;
  if constexpr (Codec::FLOAT) {
    if (layout.scale == ScaleId::e8m0) return e8m0_scale(magnitude, Codec::MAX_CODE, marked);
    if (layout.scale == ScaleId::e4m3) {
      float group = magnitude;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2)
        if (distance >= threads && distance < layout.group / V)
          group = fmaxf(group, __shfl_xor_sync(ALL, group, distance));
      return e4m3_scale(magnitude, group, marked);
    }
  }
  return plain_scale(layout.scale, magnitude, marked, false);
}

// t = h * (max_code / scale), 0 in marked and in all-zero blocks; h * 2**-e where the scale is a power of two.
template <class Codec>
__device__ __forceinline__ void scale_down(const float (&h)[V], const BlockScale& scale, ScaleId kind, float (&t)[V]) {
  if (Codec::FLOAT && kind == ScaleId::e8m0) {
    const float power = as_float((254 - scale.code) << 23);
#pragma unroll
    for (int j = 0; j < V; ++j) t[j] = scale.marked ? 0.0f : __fmul_rn(h[j], power);
    return;
  }
  const float factor = inverse(Codec::MAX_CODE, scale.value);
  if (scale.value >= 1.0f / LIFT && scale.value < LARGEST_BF16) {
#pragma unroll
    for (int j = 0; j < V; ++j) t[j] = __fmul_rn(h[j], factor);
    return;
  }
  // Rare: marked, all zero, tiny, or larger than a bf16 scale can say, which t must not show.
  const bool zero = scale.marked || scale.value == 0.0f;
  const float up = lift(scale.value);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float all = __fmul_rn(__fmul_rn(h[j], up), factor);
    t[j] = zero ? 0.0f : fminf(fmaxf(all, -Codec::MAX_CODE), Codec::MAX_CODE);
  }
}

// Encode the CTA's blocks. Every thread of the CTA takes part; threads outside the chunk write nothing.
template <class Codec>
__device__ __forceinline__ Sent encode_block(const float (&h)[V], const Layout& layout, const Random& random,
                                             const Blocks& blocks, const Target& to, BlockMeetings& meetings) {
  float t[V];
  Codes codes;
  const bool signs = std::is_same_v<Codec, Sign> && !random.stochastic;
  if (signs) codes = {Codec::nearest(eight<0>(h)), Codec::nearest(eight<1>(h))};  // they need no scale: h is free early
  const BlockScale scale = find_scale<Codec>(h, layout, random, blocks, to, meetings);
  if (signs) {
    if (scale.marked) codes.halves[0].low = codes.halves[1].low = 0xFF;  // as of zeros
  } else if (random.stochastic) {
    scale_down<Codec>(h, scale, layout.scale, t);
    const uint64_t eighth = counter(layout, blocks, to);
    codes.halves[0] = Codec::stochastic(eight<0>(t), Draw(random, eighth));
    codes.halves[1] = Codec::stochastic(eight<1>(t), Draw(random, eighth + 1));
  } else {
    scale_down<Codec>(h, scale, layout.scale, t);
    codes = {Codec::nearest(eight<0>(t)), Codec::nearest(eight<1>(t))};
  }
  if (to.inside) {
    store_codes<Codec::BITS>(to.row + to.i / 8 * Codec::BITS, to.aligned, codes);
    if ((to.i & (layout.block - 1)) == 0) {
      const int bytes = scale_bytes(layout.scale);
      uint8_t* scales = to.row + layout.scales_offset;
      store_bytes(scales + (to.i >> log2_of(layout.block)) * bytes, scale.code, bytes, to.aligned);
    }
    if (Codec::FLOAT && layout.group != 0 && (to.i & (layout.group - 1)) == 0)
      store_bytes(to.row + layout.groups_offset + (to.i >> log2_of(layout.group)) * 4, bits_of(scale.group), 4,
                  to.aligned);
  }
  return {codes, scale.value};
}

// The values that codes stand for: (code * (1 / max_code)) * scale; code * scale for power-of-two scales.
template <class Codec>
__device__ __forceinline__ void decode_block(const Codes& codes, float scale, ScaleId kind, float (&x)[V]) {
  Codec::values(codes.halves[0], eight<0>(x));
  Codec::values(codes.halves[1], eight<1>(x));
  if constexpr (Codec::FLOAT) {
    const float unit = kind == ScaleId::e8m0 ? 1.0f : 1.0f / Codec::MAX_CODE;
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fmul_rn(x[j], unit * Codec::VALUE_SCALE);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = __fmul_rn(x[j], scale);
}

}  // namespace commq::cuda
