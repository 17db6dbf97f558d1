// What the builds of cpu_families.h for different instruction sets offer to cpu_codec.cpp.
#pragma once

#include <cstdint>

#include "codec.h"

namespace commq::cpu {

constexpr int MAX_TILE = 4096;
constexpr int SMALL_TILE = 1024;  // its floats, a few times over, stay in the first-level cache

// Chunks are cut into tiles that keep blocks, groups and rotated runs whole. A tile is read and written once.
struct Grid {
  int64_t rows;
  int64_t chunk_numel;
  int32_t tile;  // elements; the last tile of a chunk may be shorter

  Grid(int64_t rows, int64_t chunk_numel, int32_t unit)
      : rows(rows), chunk_numel(chunk_numel), tile(unit > SMALL_TILE ? unit : SMALL_TILE) {}

  int64_t tiles_per_row() const { return (chunk_numel + tile - 1) / tile; }
  int64_t tiles() const { return rows * tiles_per_row(); }
};

// Elements that a tile must keep together: powers of two, so the largest is a multiple of all.
inline int32_t unit(const Layout& layout) {
  if (layout.scale == ScaleId::none) return 1;
  return layout.block > layout.group ? layout.block : layout.group;
}

inline Grid grid(const Layout& layout, int32_t also) {
  const int32_t own = unit(layout);
  return {layout.rows, layout.chunk_numel, own > also ? own : also};
}

inline Grid grid(const EncodeArgs& args) { return grid(args.layout, args.rotation); }
inline Grid grid(const DecodeArgs& args) { return grid(args.layout, args.rotation); }
inline Grid grid(const DecodeSumArgs& args) { return {1, args.layout.chunk_numel, unit(args.layout)}; }
inline Grid grid(const DecodeSumEncodeArgs& args) { return grid(args.answer_layout, unit(args.layout)); }

// Each handles the tiles [begin, end) of its grid and may run in several threads at once.
struct Kernels {
  const char* name;
  void (*encode_bucket)(const EncodeArgs&, int64_t begin, int64_t end);
  void (*decode_bucket)(const DecodeArgs&, int64_t begin, int64_t end);
  void (*decode_sum)(const DecodeSumArgs&, int64_t begin, int64_t end);
  void (*decode_sum_encode)(const DecodeSumEncodeArgs&, int64_t begin, int64_t end);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // clang has no target pragma
#define COMMQ_X86_KERNELS
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The name of the kernels that this machine runs: avx512, avx2 or portable.
const char* instruction_set();

}  // namespace commq::cpu
