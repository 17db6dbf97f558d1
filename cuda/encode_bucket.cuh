// encode_bucket: x and the residual are read once, stay in registers, and become codes, scales and the new residual.
#pragma once

#include "families.cuh"
#include "feedback.cuh"
#include "levels.cuh"
#include "raw.cuh"

namespace commq::cuda {

struct EncodeMeetings {
  BlockMeetings block;
  FeedbackMeetings feedback;
};

// The residual of a kernel that has none.
struct Nothing {
  __device__ __forceinline__ Nothing(const EncodeArgs&, const Place&) {}
};

// What an instantiation may leave out. The usual call (plain: bfloat16, aligned rows, no residual) needs so few
// registers that an SM holds more CTAs, with more loads under way.
enum class Case { plain, residual, other };

// Whether the plain kernel can also draw random numbers without spilling registers.
template <class Codec, bool Rotated>
constexpr bool PLAIN_DRAWS = !Rotated && !std::is_same_v<Codec, Sign>;

// CTAs of an SM. Signs read 16 bytes for one that they write: the more loads are under way the better.
template <class Codec, Case Kind, bool Rotated>
constexpr int ENCODE_CTAS = Kind == Case::plain   ? (std::is_same_v<Codec, Sign> && !Rotated ? 8 : 6)
                            : Kind == Case::other ? 5
                            : Rotated             ? 2
                                                  : 4;

template <class Codec, Case Kind, bool Rotated>
__global__ void __launch_bounds__(THREADS, ENCODE_CTAS<Codec, Kind, Rotated>)
    encode_bucket_kernel(const __grid_constant__ EncodeArgs args, int64_t first_row, bool some_aligned) {
  constexpr bool Residual = Kind == Case::residual, Plain = Kind == Case::plain;
  __shared__ EncodeMeetings meetings;
  [[maybe_unused]] __shared__ Exchange exchange;
  const Layout& layout = args.layout;
  const bool aligned = Plain || some_aligned;
  const int64_t i = thread_element(), row_number = first_row + blockIdx.y;
  const Place at = place(layout, row_number, i, aligned);
  uint8_t* row = args.wire + row_number * layout.row_stride;
  const Target to{row, i, at.n, at.n, i < layout.chunk_numel, aligned};

  if constexpr (IS_LEVELS<Codec>) Codec::prepare(layout);
  const Random random = Plain && !PLAIN_DRAWS<Codec, Rotated> ? Random{} : args.random;

  float h[V], e[V], y[V];
  [[maybe_unused]] const std::conditional_t<Residual, OldResidual, Nothing> old(args, at);
  load(args.x, Plain ? Dtype::bf16 : args.x_dtype, at, h);
  if constexpr (Residual) old.decode(args, at, e);
  zero_padding(row, layout, IS_LEVELS<Codec> ? code_bits(layout.format) : Codec::BITS);
  if (args.prescale != 1.0f) {
#pragma unroll
    for (int j = 0; j < V; ++j) h[j] = __fmul_rn(h[j], args.prescale);
  }
  if constexpr (Residual) {
#pragma unroll
    for (int j = 0; j < V; ++j) h[j] = __fadd_rn(h[j], e[j]);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) y[j] = h[j];
  if constexpr (Rotated) rotate(y, args.rotation, args.signs, i, exchange);
  const Sent sent = encode_any<Codec>(y, layout, random, args.blocks, to, meetings.block);

  if constexpr (Residual) {
    decode_block<Codec>(sent.codes, sent.scale, layout.scale, y);
    if constexpr (Rotated) unrotate(y, args.rotation, args.signs, i, exchange);
    uint32_t dropped = 0;
    if constexpr (Rotated) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (!finite(y[j])) dropped |= 1u << j;
    } else if (!finite(sent.scale)) {  // what an encoder sends is finite as a block: no code is above 1 in units of it
      dropped = 0xFFFF;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) h[j] = __fmul_rn(__fadd_rn(h[j], -y[j]), args.gain);
    if (args.decay != 0.0f) {
      old.decode(args, at, e);  // again, rather than keep it in registers all the time
#pragma unroll
      for (int j = 0; j < V; ++j) h[j] = __fadd_rn(__fmul_rn(e[j], args.decay), h[j]);
    }
    store_residual<Rotated>(args, at, h, dropped, meetings.feedback);
  }
}

// Raw formats have neither residual nor rotation.
static __global__ void __launch_bounds__(THREADS)
    encode_raw_kernel(const __grid_constant__ EncodeArgs args, int64_t first_row, bool aligned) {
  const Layout& layout = args.layout;
  const int64_t i = thread_element(), row_number = first_row + blockIdx.y;
  const Place at = place(layout, row_number, i, aligned && layout.chunk_numel % 8 == 0);
  float x[V];
  load(args.x, args.x_dtype, at, x);
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = __fmul_rn(x[j], args.prescale);
  round_raw(x, layout.format, args.random, at.n);
  const int count = place_in_row(layout.chunk_numel, i, aligned).valid;
  store_raw(args.wire + row_number * layout.row_stride, layout.format, i, count, aligned, x);
}

template <class Codec, bool Rotated>
void launch_blocks(const EncodeArgs& args, const Launch& launch) {
  const bool draws = PLAIN_DRAWS<Codec, Rotated> || !args.random.stochastic;
  if (args.residual_kind != ResidualId::none)
    launch(encode_bucket_kernel<Codec, Case::residual, Rotated>, args);
  else if (launch.aligned && args.x_dtype == Dtype::bf16 && draws)
    launch(encode_bucket_kernel<Codec, Case::plain, Rotated>, args);
  else
    launch(encode_bucket_kernel<Codec, Case::other, Rotated>, args);
}

template <class Codec>
void launch_encode_bucket(const EncodeArgs& args, const Launch& launch) {
  if constexpr (std::is_same_v<Codec, Raw>) {
    launch(encode_raw_kernel, args);
  } else {
    if (args.rotation)
      launch_blocks<Codec, true>(args, launch);
    else
      launch_blocks<Codec, false>(args, launch);
  }
}

}  // namespace commq::cuda
