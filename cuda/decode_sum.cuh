// decode_sum_encode: the messages about one chunk are read once, summed in registers and encoded again.
#pragma once

#include "families.cuh"
#include "source.cuh"

namespace commq::cuda {

// Messages whose loads are under way at the same time, as many as the registers of the usual call allow.
template <class Codec>
constexpr int MESSAGES = Codec::FLOAT ? 4 : 8;
template <>
constexpr int MESSAGES<Raw> = 1;

// IEEE division; by a power of two it is an exact multiplication.
__device__ __forceinline__ void divide(float (&x)[V], float divisor) {
  if (divisor == 1.0f) return;
  const uint32_t bits = bits_of(divisor);
  const uint32_t exponent = bits >> 23 & 0xFF;
  if ((bits & 0x7FFFFFu) == 0 && exponent >= 1 && exponent <= 253) {
    const float factor = as_float((254 - exponent) << 23 | (bits & 0x80000000u));
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fmul_rn(x[j], factor);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fdiv_rn(x[j], divisor);
  }
}

// x += `Count` messages, or x = their sum if they are the first, from `row` on, all of whose loads come first.
// All lanes take part.
template <class Codec, int Count, bool First>
__device__ __forceinline__ void add_messages(const Layout& layout, ScaleId kind, const uint8_t* row, const Offsets& at,
                                             bool aligned, float (&x)[V]) {
  Source<Codec> sources[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) sources[k].load(row + k * layout.row_stride, layout, kind, at, aligned);
  if (Count > 1) __syncwarp();  // else the compiler delays loads to save registers, and waits for each
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    float message[V];
    sources[k].decode(kind, message);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = First && k == 0 ? message[j] : __fadd_rn(x[j], message[j]);
  }
}

// x = the sum of the messages, in order, of which there is at least one: `Count` at a time. All lanes take part.
template <class Codec, int Count>
__device__ __forceinline__ void sum_messages(const DecodeSumEncodeArgs& args, ScaleId kind, int64_t i, bool aligned,
                                             float (&x)[V]) {
  const Layout& layout = args.layout;
  const Offsets at = Source<Codec>::offsets(layout, i);
  const uint8_t* row = args.wire;
  int64_t left = layout.rows;
  if (aligned && left >= Count) {  // a branch of its own, so that no load waits for the other way of loading
    const int64_t step = Count * layout.row_stride;
    add_messages<Codec, Count, true>(layout, kind, row, at, true, x);
    for (left -= Count, row += step; left >= Count; left -= Count, row += step)
      add_messages<Codec, Count, false>(layout, kind, row, at, true, x);
  } else {
    add_messages<Codec, 1, true>(layout, kind, row, at, aligned, x);
    --left, row += layout.row_stride;
  }
  for (; left > 0; --left, row += layout.row_stride)
    add_messages<Codec, 1, false>(layout, kind, row, at, aligned, x);
}

// Encode x as the answer; `sent` is what it decodes to, if there is a residual to keep.
template <class Codec>
__device__ __forceinline__ void encode_answer(const DecodeSumEncodeArgs& args, const Target& to, const float (&x)[V],
                                              BlockMeetings& meetings, float (&sent)[V]) {
  const Layout& layout = args.answer_layout;
  const Sent answer = encode_any<Codec>(x, layout, args.random, args.blocks, to, meetings);
  if (args.residual != nullptr) decode_block<Codec>(answer.codes, answer.scale, layout.scale, sent);
}

template <class Codec>
__global__ void __launch_bounds__(THREADS, std::is_same_v<Codec, Raw> ? 2 : 3)
    decode_sum_encode_kernel(const __grid_constant__ DecodeSumEncodeArgs args, int64_t, bool aligned) {
  __shared__ BlockMeetings meetings;
  const Layout& answer = args.answer_layout;
  const int64_t i = thread_element();
  const bool inside = i < answer.chunk_numel;
  const Place at = place_in_row(answer.chunk_numel, i, aligned);
  if constexpr (IS_LEVELS<Codec>) Codec::prepare(args.layout);
  float x[V], sent[V];
  constexpr int COUNT = MESSAGES<Codec> < 4 ? MESSAGES<Codec> : 4;  // the answer of any format takes registers too
  sum_messages<Codec, COUNT>(args, args.layout.scale, inside ? i : 0, aligned, x);
  divide(x, args.divisor);
  if (args.residual != nullptr) {
    load(args.residual, Dtype::f32, at, sent);  // the old residual; overwritten by what is sent
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fadd_rn(x[j], sent[j]);
  }
  if (!is_raw(answer.format)) zero_padding(args.answer, answer, code_bits(answer.format));
  const Target to{args.answer, i, args.chunk * answer.chunk_numel + i, i, inside, aligned};
  switch (answer.format) {
    case FormatId::int8: encode_answer<Int8>(args, to, x, meetings, sent); break;
    case FormatId::int4: encode_answer<Int4>(args, to, x, meetings, sent); break;
    case FormatId::int2: encode_answer<Int2>(args, to, x, meetings, sent); break;
    case FormatId::sign: encode_answer<Sign>(args, to, x, meetings, sent); break;
    case FormatId::e4m3:
    case FormatId::mxfp8: encode_answer<E4M3>(args, to, x, meetings, sent); break;
    case FormatId::e5m2: encode_answer<E5M2>(args, to, x, meetings, sent); break;
    case FormatId::mxfp4:
    case FormatId::nvfp4: encode_answer<E2M1>(args, to, x, meetings, sent); break;
    case FormatId::levels1:
    case FormatId::levels2:
    case FormatId::levels3:
    case FormatId::levels4:
      AnswerLevels::prepare(answer);
      encode_answer<AnswerLevels>(args, to, x, meetings, sent);
      break;
    default:  // raw; its random numbers count the elements of the chunk
#pragma unroll
      for (int j = 0; j < V; ++j) sent[j] = x[j];
      round_raw(sent, answer.format, args.random, i);
      store_raw(args.answer, answer.format, i, at.valid, aligned, sent);
  }
  if (args.residual == nullptr) return;
  uint32_t dropped = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (!finite(sent[j])) dropped |= 1u << j;
    x[j] = fminf(fmaxf(__fadd_rn(x[j], -sent[j]), -FLT_MAX), FLT_MAX);
  }
  store(args.residual, Dtype::f32, at, x, dropped);
}

// The usual call: nothing but whole, aligned rows, no residual, nearest rounding, and an answer in the messages' format
// or (Answer = Raw) the float32 sum. Few registers, so that a medium bucket's CTAs all run at once.
template <class Codec, class Answer>
__global__ void __launch_bounds__(THREADS, 4)
    decode_sum_plain_kernel(const __grid_constant__ DecodeSumEncodeArgs args, int64_t, bool) {
  const Layout& answer = args.answer_layout;
  const int64_t i = thread_element();
  const bool inside = i < answer.chunk_numel;
  float x[V];
  if (args.layout.scale == ScaleId::fp32)  // a branch of its own, with nothing to choose
    sum_messages<Codec, MESSAGES<Codec>>(args, ScaleId::fp32, inside ? i : 0, true, x);
  else
    sum_messages<Codec, MESSAGES<Codec>>(args, args.layout.scale, inside ? i : 0, true, x);
  divide(x, args.divisor);
  if constexpr (std::is_same_v<Answer, Raw>) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (x[j] != x[j]) x[j] = as_float(0x7FC00000u);
    store(args.answer, Dtype::f32, place_in_row(answer.chunk_numel, i, true), x);
  } else {
    __shared__ BlockMeetings meetings;
    zero_padding(args.answer, answer, Answer::BITS);
    const Target to{args.answer, i, args.chunk * answer.chunk_numel + i, i, inside, true};
    encode_block<Answer>(x, answer, Random{}, args.blocks, to, meetings);
  }
}

template <class Codec>
void launch_decode_sum_encode(const DecodeSumEncodeArgs& args, const Launch& launch) {
  if constexpr (!std::is_same_v<Codec, Raw> && !IS_LEVELS<Codec>) {
    const FormatId answer = args.answer_layout.format;
    const bool plain = launch.aligned && args.residual == nullptr && !args.random.stochastic;
    if (plain && answer == FormatId::fp32) return launch(decode_sum_plain_kernel<Codec, Raw>, args);
    if (plain && answer == args.layout.format) return launch(decode_sum_plain_kernel<Codec, Codec>, args);
  }
  launch(decode_sum_encode_kernel<Codec>, args);
}

}  // namespace commq::cuda
