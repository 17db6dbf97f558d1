// The residual of a bucket, 16 elements a thread: float32, bfloat16, or int8 with one float32 scale for each block.
#pragma once

#include "encode_block.cuh"

namespace commq::cuda {

struct FeedbackMeetings {
  Meeting max, dropped;
};

__device__ __forceinline__ Dtype residual_dtype(ResidualId kind) {
  return kind == ResidualId::f32 ? Dtype::f32 : Dtype::bf16;
}

// The residual as it was. That of int8 is loaded first, so that x need not wait for it, and kept as codes.
struct OldResidual {
  Codes codes{};
  float scale = 0.0f;  // 0 where all is padding

  __device__ __forceinline__ OldResidual(const EncodeArgs& args, const Place& at) {
    if (args.residual_kind != ResidualId::int8) return;
    if (at.valid > 0) scale = args.residual_scales[at.n >> log2_of(args.layout.block)];
    const uint8_t* bytes = static_cast<const uint8_t*>(args.residual) + at.n;
    if (at.whole()) {
      codes = load_codes<8>(bytes, true);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        Packed& half = codes.halves[j / 8];
        if (j < at.valid) (j % 8 < 4 ? half.low : half.high) |= static_cast<uint32_t>(bytes[j]) << (8 * (j % 4));
      }
    }
  }

  __device__ __forceinline__ void decode(const EncodeArgs& args, const Place& at, float (&e)[V]) const {
    if (args.residual_kind == ResidualId::int8)
      decode_block<Int8>(codes, scale, ScaleId::fp32, e);
    else
      load(args.residual, residual_dtype(args.residual_kind), at, e);
  }
};

// Write e where what was sent is finite; `dropped` has bit j set where it is not and the old residual stays.
template <bool Rotated>
__device__ __forceinline__ void store_residual(const EncodeArgs& args, const Place& at, float (&e)[V],
                                               uint32_t dropped, FeedbackMeetings& meetings) {
  if (args.residual_kind != ResidualId::int8) {
    const bool bf16 = args.residual_kind == ResidualId::bf16;
    const float top = bf16 ? as_float(0x7F7F0000u) : FLT_MAX;
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] = fminf(fmaxf(e[j], -top), top);
    store(args.residual, residual_dtype(args.residual_kind), at, e, dropped);
    return;
  }
  if (!at.whole() || dropped != 0) {  // rare
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j >= at.valid || (dropped >> j & 1)) e[j] = 0.0f;
  }
  const int threads = args.layout.block / V;
  float amax = reduce_max(max_magnitude(e), threads, meetings.max);
  const uint32_t mine = dropped & ((1u << at.valid) - 1);
  // Without a rotation a block is dropped as a whole.
  const bool any_dropped = Rotated ? reduce_max(mine ? 1.0f : 0.0f, threads, meetings.dropped) != 0.0f : mine != 0;
  if (!(amax >= 1.0f / LIFT && amax <= FLT_MAX)) {  // rare: too small to divide by, or the residual would be infinite
    amax = fminf(amax, FLT_MAX);
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] = __fmul_rn(fminf(fmaxf(e[j], -FLT_MAX), FLT_MAX), lift(amax));
  }
  const float factor = inverse(127.0f, amax);
  float t[V];
#pragma unroll
  for (int j = 0; j < V; ++j) t[j] = __fmul_rn(e[j], factor);
  const Codes codes{Int8::nearest(eight<0>(t)), Int8::nearest(eight<1>(t))};
  uint8_t* residual = static_cast<uint8_t*>(args.residual) + at.n;
  if (at.whole() && dropped == 0) {
    store_codes<8>(residual, true, codes);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j < at.valid && !(dropped >> j & 1))
        residual[j] = codes.byte(j, 8);
  }
  if ((at.n & (args.layout.block - 1)) == 0 && at.valid > 0 && !any_dropped)
    args.residual_scales[at.n >> log2_of(args.layout.block)] = amax;
}

}  // namespace commq::cuda
