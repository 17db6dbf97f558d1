// The residual of error feedback: what encoding lost, in float32, bfloat16 or int8 with a scale for each block.
#pragma once

#include "codec.h"
#include "cpu_memory.h"
#include "cpu_scales.h"

namespace commq::cpu {
namespace {

// The residual of one tile, whole blocks of it. decay, gain: e <- decay * e + gain * lost.
struct Residual {
  ResidualId kind;
  uint8_t* e;
  float* scales;  // int8 only: of the tile's blocks
  int block;
  float decay, gain;
};

// How each kind is read: i counts elements of the tile.
template <class T>
struct FloatResidual {
  const uint8_t* e;
  COMMQ_INLINE Floats operator()(int i) const { return T::load(e, i); }
};

struct CodeResidual {
  const uint8_t* e;
  const float* scales;
  int shift;  // log2 of the block
  COMMQ_INLINE Floats operator()(int i) const {
    return (to_floats((load_bytes(e + i) << 24) >> 24) * (1.0f / 127.0f)) * scales[i >> shift];
  }
};

COMMQ_INLINE CodeResidual code_residual(const Residual& residual) {
  return {residual.e, residual.scales, __builtin_ctz(static_cast<unsigned>(residual.block))};
}

// Calls `work` with the reader of the residual's kind.
template <class Work>
void with_residual(const Residual& residual, Work work) {
  switch (residual.kind) {
    case ResidualId::none:
      return;
    case ResidualId::f32:
      return work(FloatResidual<F32>{residual.e});
    case ResidualId::bf16:
      return work(FloatResidual<Bf16>{residual.e});
    case ResidualId::int8:
      return work(code_residual(residual));
  }
}

// h = x * prescale + e for n elements, a multiple of 16.
void load_compensated(const uint8_t* x, Dtype dtype, float prescale, const Residual& residual, int n, float* h) {
  with_dtype(dtype, [&](auto type) {
    with_residual(residual, [=](auto e) {
      for (int i = 0; i < n; i += WIDTH) store(h + i, decltype(type)::load(x, i) * prescale + e(i));
    });
  });
}

// Where `sent` is not finite, nothing is known to be lost: NaN.
COMMQ_INLINE Floats lost_of(Floats h, Floats sent) { return is_finite(sent) ? h - sent : as_floats(all(NAN_BITS)); }

// e stays where lost is NaN.
template <class T, bool Decay>
void update_floats(const Residual& residual, const float* lost, int n) {
  const float decay = residual.decay, gain = residual.gain;
  uint8_t* e = residual.e;
  for (int i = 0; i < n; i += WIDTH) {
    const Floats l = load_floats(lost + i);
    Floats next = l * gain;
    if (Decay) next = T::load(e, i) * decay + next;
    T::store_where(e, i, l == l, saturate(next, all(T::top)));
  }
}

// A block in which something was not finite: mended is next within the finite numbers, and 0 where lost is NaN. False
// says that there was such a place.
bool mend(const float* lost, const float* next, int block, float* mended, int32_t& amax) {
  Ints largest{}, missing{};
  for (int i = 0; i < block; i += WIDTH) {
    const Floats l = load_floats(lost + i);
    const Ints keep = l == l;
    const Ints bits = as_bits(saturate(load_floats(next + i), all(LARGEST))) & keep;
    largest = larger(largest, bits & INT32_MAX);
    missing = larger(missing, keep + 1);
    store(mended + i, bits);
  }
  amax = largest_of(largest);
  return largest_of(missing) == 0;
}

// int8 storage, as the format int8 with fp32 scales. Codes stay where lost is NaN, a block's scale if that is so
// anywhere in the block.
template <bool Decay>
void update_codes(const Residual& residual, const float* lost, int n, float* scratch) {
  const int block = residual.block, count = n / block;
  const float decay = residual.decay, gain = residual.gain;
  uint8_t* codes = residual.e;
  const float* next = lost;
  if (Decay || gain != 1.0f) {
    const CodeResidual e = code_residual(residual);
    for (int i = 0; i < n; i += WIDTH) {
      const Floats update = load_floats(lost + i) * gain;
      store(scratch + i, Decay ? e(i) * decay + update : update);
    }
    next = scratch;
  }
  Scales scales;
  measure(next, block, count, scales);
  for (int b = 0; b < count; ++b) {
    const int first = b * block;
    if (!scales.marked[b] || mend(lost + first, next + first, block, scratch + first, scales.amax[b]))
      residual.scales[b] = float_of(scales.amax[b]);
  }
  std::memcpy(scales.s, scales.amax, sizeof scales.s);
  set_multipliers(127.0f, count, scales);
  for (int b = 0; b < count; ++b) {
    const bool marked = scales.marked[b] != 0;
    const float* from = marked ? scratch : next;
    const float up = scales.up[b], inverse = scales.inverse[b];
    for (int i = b * block; i < (b + 1) * block; i += WIDTH) {
      Ints code = round_even((load_floats(from + i) * up) * inverse);  // within 127, as |from| <= amax
      if (marked) {
        const Floats l = load_floats(lost + i);
        code = l == l ? code : load_bytes(codes + i);
      }
      store_bytes(codes + i, code);
    }
  }
}

// lost: h - sent for n elements, NaN where sent is not finite. scratch: n floats.
template <bool Decay>
void update_as(const Residual& residual, const float* lost, int n, float* scratch) {
  switch (residual.kind) {
    case ResidualId::none:
      return;
    case ResidualId::f32:
      return update_floats<F32, Decay>(residual, lost, n);
    case ResidualId::bf16:
      return update_floats<Bf16, Decay>(residual, lost, n);
    case ResidualId::int8:
      return update_codes<Decay>(residual, lost, n, scratch);
  }
}

void update_residual(const Residual& residual, const float* lost, int n, float* scratch) {
  if (residual.decay == 0.0f)
    update_as<false>(residual, lost, n, scratch);
  else
    update_as<true>(residual, lost, n, scratch);
}

}  // namespace
}  // namespace commq::cpu
