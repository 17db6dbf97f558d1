// Magnitudes of a tile's blocks, their bytes on the wire and what multiplies by them: scales.py, all blocks at once.
#pragma once

#include "codec.h"
#include "cpu_formats.h"
#include "cpu_kernels.h"
#include "cpu_numbers.h"

namespace commq::cpu {
namespace {

constexpr int MAX_BLOCKS = MAX_TILE / 16;
constexpr float LIFT = 0x1p64f;

// One entry for each block. Loops work on whole vectors, so entries after a tile's last block hold anything.
struct alignas(64) Scales {
  int32_t amax[MAX_BLOCKS];       // bits of the magnitude to encode: largest or mean; 0 in a marked block
  int32_t marked[MAX_BLOCKS];     // -1: the block holds a number that is not finite; else 0
  float s[MAX_BLOCKS];            // the magnitude as it decodes: NaN in a marked block
  float up[MAX_BLOCKS];           // t = (h * up) * inverse
  float inverse[MAX_BLOCKS];      // likewise
  float tops[MAX_BLOCKS];         // nvfp4: the scale of the block's group
  uint8_t bytes[4 * MAX_BLOCKS];  // s as it stands on the wire
};

COMMQ_INLINE Floats lift(Floats amax) { return amax < 1 / LIFT ? all(LIFT) : all(1.0f); }

void measure(const float* y, int block, int count, Scales& scales) {
  for (int b = 0; b < count; ++b) {
    Ints largest{};
    for (int i = b * block; i < (b + 1) * block; i += WIDTH) largest = larger(largest, magnitude(load_floats(y + i)));
    scales.amax[b] = largest_of(largest);
  }
  for (int b = 0; b < count; b += WIDTH) {
    const Ints amax = load_ints(scales.amax + b);
    const Ints marked = amax >= INFINITY_BITS;
    store(scales.marked + b, marked);
    store(scales.amax + b, amax & ~marked);
  }
}

// Mean magnitude of each block over its first `valid` elements, instead of the largest: sign with nearest rounding.
// Sums add adjacent pairs first, level by level for the whole tile.
void take_means(const float* y, const int32_t* valid, int block, int count, Scales& scales) {
  alignas(64) float whole[MAX_TILE], half[MAX_TILE / 2];
  for (int b = 0; b < count; ++b) {
    const float amax = float_of(scales.amax[b]);
    const float up = amax >= LIFT ? 0x1p-16f : amax < 1 / LIFT ? LIFT : 1.0f;
    for (int i = b * block; i < (b + 1) * block; i += WIDTH)
      store(whole + i, as_floats(magnitude(load_floats(y + i)) & ~all(scales.marked[b])) * up);
    for (int i = valid[b] > 0 ? valid[b] : 0; i < block; ++i) whole[b * block + i] = 0.0f;
  }
  const float* sums = whole;
  for (int width = 1, n = block * count; width < block; width *= 2, n /= 2) {
    float* __restrict next = sums == whole ? half : whole;
    for (int i = 0; i < n / 2; ++i) next[i] = sums[2 * i] + sums[2 * i + 1];
    sums = next;
  }
  for (int b = 0; b < count; ++b) {
    const float amax = float_of(scales.amax[b]);
    const float down = amax >= LIFT ? 0x1p16f : amax < 1 / LIFT ? 1 / LIFT : 1.0f;
    const float mean = sums[b] / static_cast<float>(valid[b] > 1 ? valid[b] : 1) * down;
    scales.amax[b] = bits_of(mean < amax ? mean : amax);
  }
}

COMMQ_INLINE Ints bf16_up(Ints bits) { return smaller((bits + 0xFFFF) >> 16, all(0x7F7F)); }

COMMQ_INLINE Ints bf16_nearest(Ints bits) {
  return smaller((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, all(0x7F7F));
}

// Biased exponent of the smallest power of two 2**e with amax <= max_code * 2**e.
COMMQ_INLINE Ints e8m0_up(Ints bits, int32_t max_code_bits) {
  const int32_t exponent = (max_code_bits >> 23) - 127;
  const Ints e = ((bits + (0x7FFFFF - (max_code_bits & 0x7FFFFF))) >> 23) - exponent;
  return larger(all(0), smaller(e, all(254 - exponent)));
}

COMMQ_INLINE Floats e8m0_value(Ints code) {
  const Floats power = as_floats(code == 0 ? all(0x00400000) : code << 23);
  return code == 0xFF ? as_floats(all(NAN_BITS)) : power;
}

// Pattern of the smallest e4m3 number >= y, for y in [0, 448].
COMMQ_INLINE Ints e4m3_up(Floats y) {
  const Ints exponent = larger((as_bits(y) >> 23) - 127, all(-6));
  const Ints k = round_up(y * as_floats((127 + 3 - exponent) << 23));
  return smaller(((exponent + 6) << 3) + k, all(0x7E));
}

// The fp32 scales of nvfp4's groups.
void encode_groups(int per_group, int count, Scales& scales, uint8_t* wire) {
  for (int first = 0; first < count; first += per_group, wire += 4) {
    int32_t largest = 0;
    for (int b = first; b < first + per_group; ++b) largest = scales.amax[b] > largest ? scales.amax[b] : largest;
    std::memcpy(wire, &largest, 4);
    for (int b = first; b < first + per_group; ++b) scales.tops[b] = float_of(largest);
  }
}

void decode_groups(const uint8_t* wire, int per_group, int count, Scales& scales) {
  for (int first = 0; first < count; first += per_group, wire += 4)
    for (int b = first; b < first + per_group; ++b) std::memcpy(scales.tops + b, wire, 4);
}

// scales.amax, rounded as the layout's scale says, into scales.bytes.
void round_scales(const Layout& layout, float max_code, bool mean, int count, Scales& scales) {
  for (int b = 0; b < count; b += WIDTH) {
    const Ints amax = load_ints(scales.amax + b);
    const Ints marked = load_ints(scales.marked + b);
    switch (layout.scale) {
      case ScaleId::none:
        break;
      case ScaleId::fp32:
        store(scales.bytes + 4 * b, marked ? all(NAN_BITS) : amax);
        break;
      case ScaleId::bf16:
        store_halves(scales.bytes + 2 * b, marked ? all(NAN_BITS >> 16) : mean ? bf16_nearest(amax) : bf16_up(amax));
        break;
      case ScaleId::e8m0:
        store_bytes(scales.bytes + b, marked ? all(0xFF) : e8m0_up(amax, bits_of(max_code)));
        break;
      case ScaleId::e4m3: {
        const Floats top = load_floats(scales.tops + b), up = lift(top);
        const Floats inverse = top > 0.0f ? 448.0f / (top * up) : all(0.0f);
        const Floats y = (as_floats(amax) * up) * inverse;
        store_bytes(scales.bytes + b, marked ? all(0x7F) : e4m3_up(y < 448.0f ? y : all(448.0f)));
        break;
      }
    }
  }
}

// scales.s, the magnitudes that scales.bytes stand for.
void scale_values(const Layout& layout, int count, Scales& scales) {
  const uint8_t* bytes = scales.bytes;
  float* s = scales.s;
  for (int b = 0; b < count; b += WIDTH) {
    switch (layout.scale) {
      case ScaleId::none:
        break;
      case ScaleId::fp32:
        store(s + b, load_floats(bytes + 4 * b));
        break;
      case ScaleId::bf16:
        store(s + b, from_bf16(load_halves(bytes + 2 * b)));
        break;
      case ScaleId::e8m0:
        store(s + b, e8m0_value(load_bytes(bytes + b)));
        break;
      case ScaleId::e4m3:
        store(s + b, (E4M3::value(load_bytes(bytes + b)) * (1.0f / 448.0f)) * load_floats(scales.tops + b));
        break;
    }
  }
}

// Reads `count` scales of a row of the wire into scales.s.
void decode_scales(const uint8_t* wire, const uint8_t* groups, const Layout& layout, int count, Scales& scales) {
  std::memcpy(scales.bytes, wire, static_cast<size_t>(count) * scale_bytes(layout.scale));
  if (layout.group > 0) decode_groups(groups, layout.group / layout.block, count, scales);
  scale_values(layout, count, scales);
}

// t = h * (max_code / s), without overflow of the quotient; s == 0 and a NaN give 0.
void set_multipliers(float max_code, int count, Scales& scales) {
  for (int b = 0; b < count; b += WIDTH) {
    const Floats s = load_floats(scales.s + b), up = lift(s);
    store(scales.up + b, up);
    store(scales.inverse + b, s > 0.0f ? max_code / (s * up) : all(0.0f));
  }
}

// Writes the scales of `count` blocks of y. valid: the elements of each that are no padding, to take the mean
// magnitude (sign with nearest rounding); null takes the largest.
void encode_scales(const float* y, const int32_t* valid, const Layout& layout, int count, uint8_t* wire,
                   uint8_t* groups, Scales& scales) {
  const float largest_code = max_code(layout.format);
  measure(y, layout.block, count, scales);
  if (valid != nullptr) take_means(y, valid, layout.block, count, scales);
  if (layout.group > 0) encode_groups(layout.group / layout.block, count, scales, groups);
  round_scales(layout, largest_code, valid != nullptr, count, scales);
  std::memcpy(wire, scales.bytes, static_cast<size_t>(count) * scale_bytes(layout.scale));
  scale_values(layout, count, scales);
  if (layout.scale != ScaleId::e8m0) return set_multipliers(largest_code, count, scales);
  for (int b = 0; b < count; b += WIDTH) {  // t = h * (1 / s), exactly
    store(scales.up + b, all(1.0f));
    store(scales.inverse + b, 1.0f / load_floats(scales.s + b));
  }
}

}  // namespace
}  // namespace commq::cpu
