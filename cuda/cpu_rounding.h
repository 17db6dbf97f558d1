// From scaled numbers to codes, one in a byte, and back: rounding.py, block by block in registers.
#pragma once

#include "codec.h"
#include "cpu_formats.h"
#include "cpu_levels.h"
#include "cpu_scales.h"

namespace commq::cpu {
namespace {

struct Nearest {
  COMMQ_INLINE Ints operator()(Floats t, int) const { return round_even(t); }
};

// 16 random bits for each element of the tile: floor(t + (r + 1/2) * 2**-16).
struct Stochastic {
  const uint16_t* random;
  COMMQ_INLINE Ints operator()(Floats t, int i) const {
    return round_down(t + (to_floats(load_halves(random + i)) + 0.5f) * 0x1p-16f);
  }
};

struct Rounded {
  Ints code;
  Floats value;
};

struct IntegerCode {
  static constexpr bool scaled = true;
  int32_t top;
  template <class Round>
  COMMQ_INLINE Rounded operator()(Floats t, int i, Round round) const {
    const Ints code = larger(all(-top), smaller(round(t, i), all(top)));
    return {code, to_floats(code)};
  }
};

template <class Round>
struct At {
  Round round;
  int i;
  COMMQ_INLINE Ints operator()(Floats t) const { return round(t, i); }
};

template <class Float>
struct FloatCode {
  static constexpr bool scaled = true;
  int32_t top;
  float largest;
  template <class Round>
  COMMQ_INLINE Rounded operator()(Floats t, int i, Round round) const {
    const auto [pattern, value] = Float::code(t, top, largest, At<Round>{round, i});
    return {pattern, value};
  }
};

// +1 with probability (1 + t) / 2.
struct RandomSign {
  static constexpr bool scaled = true;
  COMMQ_INLINE Rounded operator()(Floats t, int i, Stochastic round) const {
    const Ints code = larger(all(0), smaller(round(t * 0.5f + 0.5f, i), all(1)));
    return {code, to_floats(2 * code - 1)};
  }
};

// +1 for x >= 0, which needs no scale.
struct NearestSign {
  static constexpr bool scaled = false;
  COMMQ_INLINE Rounded operator()(Floats x, int, Nearest) const {
    const Ints code = -(x >= 0.0f);
    return {code, to_floats(2 * code - 1)};
  }
};

struct LevelCode {
  static constexpr bool scaled = true;
  const Levels& table;
  COMMQ_INLINE Rounded operator()(Floats t, int, Nearest) const {
    const auto [code, value] = find_level(t, table.edges, table);
    return {code, value};
  }
  // From the level at or below t, up with the probability of the distance to it.
  COMMQ_INLINE Rounded operator()(Floats t, int i, Stochastic round) const {
    const auto [below, value] = find_level(t, table.levels + 1, table);
    const Floats step = step_above(below, table);
    const Floats up = step > 0.0f ? (t - value) / (step > 0.0f ? step : all(1.0f)) : all(0.0f);
    const Ints code = larger(all(0), smaller(below + round(up, i), all(table.count - 1)));
    return {code, level_of(code, table)};
  }
};

COMMQ_INLINE float code_unit(const Layout& layout) {
  return layout.scale == ScaleId::e8m0 ? 1.0f : 1.0f / max_code(layout.format);
}

// Blocks that are marked or whose scale is 0 are rounded as zeros. after: what the codes decode to, or with `lost` what
// y loses by it, which is NaN exactly where the block is marked.
template <class Code, class Round>
void quantize_blocks(const float* y, const Layout& layout, int count, const Scales& scales, Code code, Round round,
                     bool lost, uint8_t* codes, float* after) {
  const float unit = code_unit(layout);
  const int block = layout.block;
  for (int b = 0; b < count; ++b) {
    const float s = scales.s[b];
    const float up = Code::scaled ? scales.up[b] : 1.0f, inverse = Code::scaled ? scales.inverse[b] : 1.0f;
    const Ints live = all(scales.marked[b] != 0 || (Code::scaled && s == 0.0f) ? 0 : -1);
    for (int i = b * block; i < (b + 1) * block; i += WIDTH) {
      const Floats x = load_floats(y + i);
      const Rounded rounded = code(as_floats(as_bits((x * up) * inverse) & live), i, round);
      const Floats sent = (rounded.value * unit) * s;
      store_bytes(codes + i, rounded.code);
      store(after + i, lost ? x - sent : sent);
    }
  }
}

// random: 16 bits for each element, or null for nearest rounding.
void quantize(const float* y, const Layout& layout, int count, const Scales& scales, const uint16_t* random,
              bool lost, uint8_t* codes, float* after) {
  const auto either = [&](auto code) {
    if (random != nullptr)
      quantize_blocks(y, layout, count, scales, code, Stochastic{random}, lost, codes, after);
    else
      quantize_blocks(y, layout, count, scales, code, Nearest{}, lost, codes, after);
  };
  switch (layout.format) {
    case FormatId::int8:
    case FormatId::int4:
    case FormatId::int2:
      return either(IntegerCode{static_cast<int32_t>(max_code(layout.format))});
    case FormatId::sign:
      if (random != nullptr)
        return quantize_blocks(y, layout, count, scales, RandomSign{}, Stochastic{random}, lost, codes, after);
      return quantize_blocks(y, layout, count, scales, NearestSign{}, Nearest{}, lost, codes, after);
    case FormatId::e4m3:
    case FormatId::mxfp8:
      return either(FloatCode<E4M3>{0x7E, 448.0f});
    case FormatId::e5m2:
      return either(FloatCode<E5M2>{0x7B, 57344.0f});
    case FormatId::mxfp4:
    case FormatId::nvfp4:
      return either(FloatCode<E2M1>{7, 6.0f});
    case FormatId::levels1:
    case FormatId::levels2:
    case FormatId::levels3:
    case FormatId::levels4:
      return either(LevelCode{layout.levels});
    default:
      return;
  }
}

struct IntegerValue {
  int unused_bits;
  COMMQ_INLINE Floats operator()(Ints code) const { return to_floats((code << unused_bits) >> unused_bits); }
};

struct SignValue {
  COMMQ_INLINE Floats operator()(Ints code) const { return to_floats(2 * code - 1); }
};

struct LevelValue {
  const Levels& table;
  COMMQ_INLINE Floats operator()(Ints code) const { return level_of(code, table); }
};

template <class Float>
struct FloatValue {
  COMMQ_INLINE Floats operator()(Ints code) const { return Float::value(code); }
};

// x = what the codes stand for, or x + that.
template <class Value>
void dequantize_blocks(const uint8_t* codes, const Layout& layout, int count, const float* s, bool add, Value value,
                       float* x) {
  const float unit = code_unit(layout);
  const int block = layout.block;
  for (int b = 0; b < count; ++b) {
    const float scale = s[b];
    for (int i = b * block; i < (b + 1) * block; i += WIDTH) {
      const Floats decoded = (value(load_bytes(codes + i)) * unit) * scale;
      store(x + i, add ? load_floats(x + i) + decoded : decoded);
    }
  }
}

void dequantize(const uint8_t* codes, const Layout& layout, int count, const float* s, bool add, float* x) {
  const auto with = [&](auto value) { dequantize_blocks(codes, layout, count, s, add, value, x); };
  switch (layout.format) {
    case FormatId::int8:
    case FormatId::int4:
    case FormatId::int2:
      return with(IntegerValue{32 - code_bits(layout.format)});
    case FormatId::sign:
      return with(SignValue{});
    case FormatId::e4m3:
    case FormatId::mxfp8:
      return with(FloatValue<E4M3>{});
    case FormatId::e5m2:
      return with(FloatValue<E5M2>{});
    case FormatId::mxfp4:
    case FormatId::nvfp4:
      return with(FloatValue<E2M1>{});
    case FormatId::levels1:
    case FormatId::levels2:
    case FormatId::levels3:
    case FormatId::levels4:
      return with(LevelValue{layout.levels});
    default:
      return;
  }
}

}  // namespace
}  // namespace commq::cpu
