// A block's scale: from the largest magnitude to bytes, and from bytes to the number they stand for.
#pragma once

#include "block.cuh"

namespace commq::cuda {

__device__ __forceinline__ float lift(float magnitude) { return magnitude < 1.0f / LIFT ? LIFT : 1.0f; }

constexpr float LARGEST_BF16 = 0x1.fep127f;

// max_code / magnitude without overflow: t = (h * lift(magnitude)) * inverse(max_code, magnitude).
__device__ __forceinline__ float inverse(float max_code, float magnitude) {
  return magnitude > 0.0f ? __fdiv_rn(max_code, __fmul_rn(magnitude, lift(magnitude))) : 0.0f;
}

__device__ __forceinline__ float e4m3_value(uint32_t code) { return E4M3::value(code); }

// Pattern of the smallest e4m3 number >= y, for y in [0, 448].
__device__ __forceinline__ uint32_t e4m3_up(float y) {
  const uint32_t binade = E4M3::Float::binade(y);
  const float ulps = __fmul_rn(y, as_float(((254u + 3) << 23) - binade));  // exact
  return min(E4M3::Float::first(binade) + __float2uint_ru(ulps), 0x7Eu);
}

__device__ __forceinline__ float e8m0_value(uint32_t code) {
  if (code == 0xFF) return as_float(0x7FC00000u);
  return as_float(code == 0 ? 0x00400000u : code << 23);
}

// Biased exponent of the smallest 2**e, e >= -127, with magnitude <= max_code * 2**e, capped so that this is finite.
__device__ __forceinline__ uint32_t e8m0_up(float magnitude, float max_code) {
  const uint32_t top = bits_of(max_code);
  const int exponent = static_cast<int>(top >> 23) - 127;
  const int biased = static_cast<int>((bits_of(magnitude) + (0x7FFFFFu - (top & 0x7FFFFFu))) >> 23) - exponent;
  return min(max(biased, 0), 254 - exponent);
}

struct BlockScale {
  uint32_t code;   // its bytes on the wire
  float value;     // what they stand for; NaN if marked
  float group;     // largest finite magnitude of the group (e4m3 scales only)
  bool marked;     // the block has a NaN or an infinity
};

// The scale of a block with largest magnitude `amax` (NaN or infinity if it has one). `mean`: of sign, else amax.
__device__ __forceinline__ BlockScale plain_scale(ScaleId kind, float magnitude, bool marked, bool mean) {
  const uint32_t bits = bits_of(magnitude);
  BlockScale scale{bits, 0.0f, 0.0f, marked};
  if (kind == ScaleId::fp32) {
    if (marked) scale.code = 0x7FC00000u;
    scale.value = as_float(scale.code);
  } else {
    scale.code = min((bits + (mean ? 0x7FFFu + (bits >> 16 & 1) : 0xFFFFu)) >> 16, 0x7F7Fu);
    if (marked) scale.code = 0x7FC0;
    scale.value = as_float(scale.code << 16);
  }
  return scale;
}

__device__ __forceinline__ BlockScale e8m0_scale(float magnitude, float max_code, bool marked) {
  const uint32_t code = marked ? 0xFF : e8m0_up(magnitude, max_code);
  return {code, e8m0_value(code), 0.0f, marked};
}

__device__ __forceinline__ float e4m3_scale_value(uint32_t code, float group) {
  return __fmul_rn(__fmul_rn(e4m3_value(code), 1.0f / 448.0f), group);
}

// Relative to the largest finite magnitude of the group of blocks.
__device__ __forceinline__ BlockScale e4m3_scale(float magnitude, float group, bool marked) {
  const float relative = __fmul_rn(__fmul_rn(magnitude, lift(group)), inverse(448.0f, group));
  const uint32_t code = marked ? 0x7F : e4m3_up(fminf(relative, 448.0f));
  return {code, e4m3_scale_value(code, group), group, marked};
}

// Exponent of a power of two.
__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

__device__ __forceinline__ uint32_t load_bytes(const uint8_t* at, int bytes, bool aligned) {
  if (aligned) return bytes == 4 ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at);
  uint32_t word = 0;
  for (int b = 0; b < bytes; ++b) word |= static_cast<uint32_t>(at[b]) << (8 * b);
  return word;
}

// A block's scale as it stands on the wire: loaded first and made a number later, so that loads need not wait for each
// other.
struct WireScale {
  uint32_t code;   // scale bytes
  uint32_t group;  // bits of the group's scale (e4m3 scales only)

  // Where the scale of element i's block, and its group's, stand within a row.
  static __device__ __forceinline__ int64_t offset(const Layout& layout, int64_t i) {
    return layout.scales_offset + (i >> log2_of(layout.block)) * scale_bytes(layout.scale);
  }
  static __device__ __forceinline__ int64_t group_offset(const Layout& layout, int64_t i) {
    return layout.group ? layout.groups_offset + (i >> log2_of(layout.group)) * 4 : 0;
  }

  template <bool Float>
  __device__ __forceinline__ void load(ScaleId kind, const uint8_t* scale, const uint8_t* group_scale, bool aligned) {
    if (Float && (kind == ScaleId::e8m0 || kind == ScaleId::e4m3)) {
      code = *scale;
      if (kind == ScaleId::e4m3) group = load_bytes(group_scale, 4, aligned);
    } else {
      code = load_bytes(scale, kind == ScaleId::bf16 ? 2 : 4, aligned);
    }
  }

  // The magnitude that it stands for.
  template <bool Float>
  __device__ __forceinline__ float value(ScaleId kind) const {
    if (Float && kind == ScaleId::e8m0) return e8m0_value(code);
    if (Float && kind == ScaleId::e4m3) return e4m3_scale_value(code, as_float(group));
    return as_float(kind == ScaleId::bf16 ? code << 16 : code);
  }
};

__device__ __forceinline__ void store_bytes(uint8_t* at, uint32_t word, int bytes, bool aligned) {
  if (aligned && bytes == 4)
    *reinterpret_cast<uint32_t*>(at) = word;
  else if (aligned && bytes == 2)
    *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(word);
  else
    for (int b = 0; b < bytes; ++b) at[b] = static_cast<uint8_t>(word >> (8 * b));
}

}  // namespace commq::cuda
