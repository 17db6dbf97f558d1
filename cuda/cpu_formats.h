// Constants of the formats, and where a tile's parts stand in its row of the wire.
#pragma once

#include "codec.h"
#include "numerics.h"

namespace commq::cpu {

constexpr float max_code(FormatId format) {
  switch (format) {
    case FormatId::int8: return 127.0f;
    case FormatId::int4: return 7.0f;
    case FormatId::int2:
    case FormatId::sign:
    case FormatId::levels1:
    case FormatId::levels2:
    case FormatId::levels3:
    case FormatId::levels4: return 1.0f;
    case FormatId::e4m3:
    case FormatId::mxfp8: return 448.0f;
    case FormatId::e5m2: return 57344.0f;
    case FormatId::mxfp4:
    case FormatId::nvfp4: return 6.0f;
    default: return 0.0f;
  }
}

constexpr Dtype raw_dtype(FormatId format) {
  return format == FormatId::fp32 ? Dtype::f32 : format == FormatId::bf16 ? Dtype::bf16 : Dtype::f16;
}

// Byte offsets in a row of what belongs to the elements from `at` on.
inline int64_t codes_at(const Layout& layout, int64_t at) { return at * code_bits(layout.format) / 8; }

inline int64_t scales_at(const Layout& layout, int64_t at) {
  return layout.scales_offset + at / layout.block * scale_bytes(layout.scale);
}

inline int64_t groups_at(const Layout& layout, int64_t at) {
  return layout.groups_offset + (layout.group > 0 ? at / layout.group * 4 : 0);
}

}  // namespace commq::cpu
