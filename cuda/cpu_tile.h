// One tile on its way between floats in the first-level cache and a row of the wire.
#pragma once

#include "codec.h"
#include "cpu_feedback.h"
#include "cpu_formats.h"
#include "cpu_kernels.h"
#include "cpu_memory.h"
#include "cpu_random.h"
#include "cpu_rounding.h"
#include "cpu_scales.h"

namespace commq::cpu {
namespace {

// Raw formats have tiles of any length; loops over floats run on to the next whole vector.
COMMQ_INLINE int whole_vectors(int n) { return (n + 15) & ~15; }

void fill(float* x, int begin, int end, float value) {
  for (int i = begin; i < end; ++i) x[i] = value;
}

// A place in memory of `length` bytes as one of `needed`: the place itself, or a copy followed by zeros.
class Window {
 public:
  Window(const void* place, int64_t length, int64_t needed) : place_(place), length_(length) {
    if (length >= needed) return;
    if (length > 0) std::memcpy(copy_, place, static_cast<size_t>(length));
    std::memset(copy_ + length, 0, static_cast<size_t>(needed - length));
    copied_ = true;
  }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  const uint8_t* data() const { return copied_ ? copy_ : static_cast<const uint8_t*>(place_); }

 protected:
  const void* place_;
  int64_t length_;
  bool copied_ = false;
  alignas(64) uint8_t copy_[4 * MAX_TILE];
};

// The same for writing: `close` puts the copy back.
class OutWindow : public Window {
 public:
  OutWindow(void* place, int64_t length, int64_t needed) : Window(place, length, needed) {}
  uint8_t* data() { return const_cast<uint8_t*>(Window::data()); }
  void close() const {
    if (copied_ && length_ > 0) std::memcpy(const_cast<void*>(place_), copy_, static_cast<size_t>(length_));
  }
};

// A tile's place: elements [at, at + n) of chunk `row`.
struct Tile {
  int64_t row;
  int64_t at;
  int n;

  Tile(const Grid& grid, int64_t index) {
    row = index / grid.tiles_per_row();
    at = (index - row * grid.tiles_per_row()) * grid.tile;
    const int64_t left = grid.chunk_numel - at;
    n = static_cast<int>(left < grid.tile ? left : grid.tile);
  }

  // How many of its elements are in a tensor of `numel`, the tile's first being number `start` there.
  int valid(int64_t start, int64_t numel) const {
    const int64_t left = numel - start;
    return static_cast<int>(left < 0 ? 0 : left < n ? left : n);
  }
};

constexpr int SKEW = 80;  // floats; keeps buffers of one size from sharing the same sets of the cache

struct alignas(64) Buffers {
  float h[MAX_TILE + SKEW];      // what is to be sent
  float y[MAX_TILE + SKEW];      // the same, rotated
  float after[MAX_TILE + SKEW];  // what of it was sent, or lost
  uint8_t codes[MAX_TILE + 4 * SKEW];
  uint32_t random[MAX_TILE / 2 + SKEW];
  uint64_t counters[MAX_TILE / 8 + SKEW];
  int32_t valid[MAX_BLOCKS];
  Scales scales;
};

// Elements [at, at + n) of a row of the wire, still rotated, into x or added to x.
void decode_tile(const uint8_t* row, const Layout& layout, int64_t at, int n, bool add, Buffers& buffers, float* x) {
  const uint8_t* codes = row + codes_at(layout, at);
  if (is_raw(layout.format)) {
    const int bytes = code_bits(layout.format) / 8;
    const Window window(codes, n * bytes, whole_vectors(n) * bytes);
    with_dtype(raw_dtype(layout.format), [=, from = window.data()](auto type) {
      for (int i = 0; i < n; i += WIDTH) {
        const Floats decoded = decltype(type)::load(from, i);
        store(x + i, add ? load_floats(x + i) + decoded : decoded);
      }
    });
    return;
  }
  const int count = n / layout.block;
  decode_scales(row + scales_at(layout, at), row + groups_at(layout, at), layout, count, buffers.scales);
  if (code_bits(layout.format) < 8) {
    unpack(codes, code_bits(layout.format), n, buffers.codes);
    codes = buffers.codes;
  }
  dequantize(codes, layout, count, buffers.scales.s, add, x);
}

// Where a tile's blocks stand in Blocks (`index`) and in the numbering that an absent Blocks means (`number`).
// `element` is the tile's first in the counter of a raw format's random bits.
struct Numbering {
  const Blocks& blocks;
  int64_t index;
  int64_t number;
  int64_t element;
};

// 16 random bits for each element of the tile.
const uint16_t* draw(const Layout& layout, const Random& random, const Numbering& place, int n, Buffers& buffers) {
  const auto* halves = reinterpret_cast<const uint16_t*>(buffers.random);
  if (is_raw(layout.format)) {
    const int skip = static_cast<int>(place.element % 8);
    const int counters = (skip + n + 7) / 8;
    for (int i = 0; i < counters; ++i) buffers.counters[i] = static_cast<uint64_t>(place.element / 8 + i);
    random_words(buffers.counters, counters, random, buffers.random);
    return halves + skip;
  }
  const int per_block = layout.block / 8;
  for (int b = 0; b < n / layout.block; ++b) {
    const int64_t id = place.blocks.ids != nullptr ? place.blocks.ids[place.index + b] : place.number + b;
    for (int i = 0; i < per_block; ++i) buffers.counters[b * per_block + i] = static_cast<uint64_t>(id) * per_block + i;
  }
  random_words(buffers.counters, n / 8, random, buffers.random);
  return halves;
}

// Elements of each block that are no padding.
const int32_t* count_valid(const Layout& layout, const Numbering& place, int count, Buffers& buffers) {
  if (place.blocks.valid != nullptr) return place.blocks.valid + place.index;
  for (int b = 0; b < count; ++b) {
    const int64_t left = layout.numel - (place.number + b) * layout.block;
    buffers.valid[b] = static_cast<int32_t>(left < 0 ? 0 : left < layout.block ? left : layout.block);
  }
  return buffers.valid;
}

// Raw elements, a NaN as the canonical one. Stochastic rounding (to bf16) adds 16 random bits below the last place:
// finite numbers stay finite, infinities stay as they are.
void encode_raw(const float* y, FormatId format, const uint16_t* random, int n, uint8_t* wire, float* lost) {
  const int bytes = code_bits(format) / 8;
  OutWindow window(wire, n * bytes, whole_vectors(n) * bytes);
  with_dtype(raw_dtype(format), [=, to = window.data()](auto type) {
    for (int i = 0; i < n; i += WIDTH) {
      const Floats x = load_floats(y + i);
      Ints bits = magnitude(x) > INFINITY_BITS ? all(NAN_BITS) : as_bits(x);
      if (random != nullptr) {
        const Ints up = smaller((bits & INT32_MAX) + load_halves(random + i), all(0x7F7FFFFF)) & ~0xFFFF;
        bits = is_finite(x) ? up | (bits & SIGN_BIT) : bits;
      }
      decltype(type)::store(to, i, as_floats(bits));
      store(lost + i, lost_of(x, decltype(type)::load(to, i)));
    }
  });
  window.close();
}

// The bytes between the sections of a row are zero.
void clear_gaps(uint8_t* row, const Layout& layout) {
  const int64_t ends[] = {codes_at(layout, layout.chunk_numel), scales_at(layout, layout.chunk_numel),
                          groups_at(layout, layout.chunk_numel)};
  const int64_t starts[] = {layout.scales_offset, layout.groups_offset, layout.chunk_bytes};
  for (int i = 0; i < 3; ++i) std::memset(row + ends[i], 0, static_cast<size_t>(starts[i] - ends[i]));
}

// Encodes y, already rotated, as elements [at, at + n) of a row of the wire. buffers.after: what they decode to, or
// with `lost` what y loses by it, NaN where that is not finite (raw formats: always the latter).
void encode_tile(const float* y, uint8_t* row, const Layout& layout, int64_t at, int n, const Random& random,
                 const Numbering& place, bool lost, Buffers& buffers) {
  const bool loses = !is_raw(layout.format) || layout.format == FormatId::bf16;
  const uint16_t* bits = random.stochastic && loses ? draw(layout, random, place, n, buffers) : nullptr;
  uint8_t* wire = row + codes_at(layout, at);
  if (is_raw(layout.format)) {
    encode_raw(y, layout.format, bits, n, wire, buffers.after);
    return;
  }
  if (at == 0) clear_gaps(row, layout);
  const int count = n / layout.block;
  if (is_levels(layout.format) && layout.levels.fit != FitId::largest) {
    encode_fitted(y, layout, count, row + scales_at(layout, at), lost, buffers.codes, buffers.after, buffers.scales);
    pack(buffers.codes, code_bits(layout.format), n, wire);
    return;
  }
  const bool mean = layout.format == FormatId::sign && !random.stochastic;
  const int32_t* valid = mean ? count_valid(layout, place, count, buffers) : nullptr;
  encode_scales(y, valid, layout, count, row + scales_at(layout, at), row + groups_at(layout, at), buffers.scales);
  const bool packed = code_bits(layout.format) < 8;
  quantize(y, layout, count, buffers.scales, bits, lost, packed ? buffers.codes : wire, buffers.after);
  if (packed) pack(buffers.codes, code_bits(layout.format), n, wire);
}

}  // namespace
}  // namespace commq::cpu
