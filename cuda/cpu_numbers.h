// Arithmetic on vectors of numbers, without branches or tables.
#pragma once

#include "cpu_vector.h"

namespace commq::cpu {
namespace {

constexpr int32_t INFINITY_BITS = 0x7F800000;
constexpr int32_t NAN_BITS = 0x7FC00000;
constexpr int32_t SIGN_BIT = INT32_MIN;
constexpr float LARGEST = 0x1.fffffep127f;

COMMQ_INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

COMMQ_INLINE float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

COMMQ_INLINE Ints as_bits(Floats x) { return reinterpret_cast<Ints>(x); }
COMMQ_INLINE Floats as_floats(Ints bits) { return reinterpret_cast<Floats>(bits); }

COMMQ_INLINE Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
COMMQ_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// Orders finite < infinity < NaN.
COMMQ_INLINE Ints magnitude(Floats x) { return as_bits(x) & INT32_MAX; }

COMMQ_INLINE Ints is_finite(Floats x) { return magnitude(x) < INFINITY_BITS; }

// x within +-top; a NaN becomes +-top.
COMMQ_INLINE Floats saturate(Floats x, Floats top) {
  return as_floats(smaller(magnitude(x), as_bits(top)) | (as_bits(x) & SIGN_BIT));
}

// Half to even, for |t| < 2**22: adding 1.5 * 2**23 leaves the integer in the low bits of the sum.
COMMQ_INLINE Ints round_even(Floats t) { return as_bits(t + 0x1.8p23f) - 0x4B400000; }

COMMQ_INLINE Ints round_down(Floats t) {
  const Ints nearest = round_even(t);
  return nearest + (to_floats(nearest) > t);  // a true comparison is -1
}

COMMQ_INLINE Ints round_up(Floats t) {
  const Ints nearest = round_even(t);
  return nearest - (to_floats(nearest) < t);
}

struct RoundEven {
  COMMQ_INLINE Ints operator()(Floats t) const { return round_even(t); }
};

// A float of fewer bits. `Special` is its first pattern that is no number, or one past the largest if there is none.
template <int Exponent, int Mantissa, int Special>
struct SmallFloat {
  static constexpr int bits = 1 + Exponent + Mantissa;
  static constexpr int bias = (1 << (Exponent - 1)) - 1;
  static constexpr int mantissa_mask = (1 << Mantissa) - 1;
  static constexpr int magnitude_mask = (1 << (bits - 1)) - 1;

  static COMMQ_INLINE Floats value(Ints code) {
    const Ints pattern = code & magnitude_mask;
    const Ints fraction = code & mantissa_mask;
    const Floats normal = as_floats((pattern << (23 - Mantissa)) + ((127 - bias) << 23));
    const Floats subnormal = to_floats(fraction) * float_of((128 - bias - Mantissa) << 23);
    Floats x = pattern > mantissa_mask ? normal : subnormal;
    if (Special <= magnitude_mask)
      x = pattern >= Special ? as_floats(INFINITY_BITS | (fraction << (23 - Mantissa))) : x;
    return as_floats(as_bits(x) | ((code << (32 - bits)) & SIGN_BIT));
  }

  struct Rounded {
    Ints pattern;
    Floats value;
  };

  // t rounded, saturating at the pattern `top` of the value `largest`. `round` takes |t| / ulp, which is exact, to an
  // integer; a carry out of the mantissa steps the exponent by itself.
  template <class Round>
  static COMMQ_INLINE Rounded code(Floats t, int32_t top, float largest, Round round) {
    const Ints t_bits = magnitude(t);
    const Ints exponent = larger((t_bits >> 23) - 127, all(1 - bias));
    const Ints k = round(as_floats(t_bits) * as_floats((127 + Mantissa - exponent) << 23));
    const Ints pattern = smaller(((exponent - (1 - bias)) << Mantissa) + k, all(top));
    const Floats ulp = as_floats((127 - Mantissa + exponent) << 23);
    const Ints value = smaller(as_bits(to_floats(k) * ulp), as_bits(all(largest)));
    const Ints sign = as_bits(t) & SIGN_BIT;
    return {pattern | ((sign >> (32 - bits)) & (magnitude_mask + 1)), as_floats(value | sign)};
  }
};

using E4M3 = SmallFloat<4, 3, 0x7F>;
using E5M2 = SmallFloat<5, 2, 0x7C>;
using E2M1 = SmallFloat<2, 1, 8>;
using Half = SmallFloat<5, 10, 0x7C00>;

COMMQ_INLINE Floats from_bf16(Ints bits) { return as_floats(bits << 16); }

// Nearest bf16 of a number.
COMMQ_INLINE Ints round_bf16(Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  return reinterpret_cast<Ints>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

COMMQ_INLINE Ints to_bf16(Floats x) { return x == x ? round_bf16(x) : all(0x7FC0); }

COMMQ_INLINE Floats from_f16(Ints bits) { return Half::value(bits); }

COMMQ_INLINE Ints to_f16(Floats x) {
  // 65536 already rounds to infinity; larger numbers would leave round_even's range.
  const Ints pattern = Half::code(saturate(x, all(65536.0f)), 0x7C00, LARGEST, RoundEven{}).pattern;
  return x == x ? pattern : all(0x7E00);
}

}  // namespace
}  // namespace commq::cpu
