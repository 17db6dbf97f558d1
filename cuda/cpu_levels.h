// Codes that index a table of levels: level_codes of rounding.py, and the scales that follow the codes.
#pragma once

#include <cmath>

#include "codec.h"
#include "cpu_scales.h"

namespace commq::cpu {
namespace {

struct Leveled {
  Ints code;
  Floats value;
};

// The last level whose edge is at or below t. edges[k] is where level k + 1 begins.
COMMQ_INLINE Leveled find_level(Floats t, const float* edges, const Levels& table) {
  Leveled found{Ints{}, all(table.levels[0])};
  for (int k = 1; k < table.count; ++k) {
    const Ints above = t >= all(edges[k - 1]);
    found.code -= above;
    found.value = above ? all(table.levels[k]) : found.value;
  }
  return found;
}

// The step above a level, by its code.
COMMQ_INLINE Floats step_above(Ints code, const Levels& table) {
  Floats step{};
  for (int k = 0; k + 1 < table.count; ++k) step = code == all(k) ? all(table.levels[k + 1] - table.levels[k]) : step;
  return step;
}

COMMQ_INLINE Floats level_of(Ints code, const Levels& table) {
  Floats level = all(table.levels[0]);
  for (int k = 1; k < table.count; ++k) level = code >= all(k) ? all(table.levels[k]) : level;
  return level;
}

// Sum of one block, adjacent pairs first. `values` is overwritten; so is `other`.
float tree_sum(float* values, float* other, int block) {
  for (int n = block / 2; n > 0; n /= 2) {
    const float* __restrict from = values;
    float* __restrict to = other;
    for (int i = 0; i < n; ++i) to[i] = from[2 * i] + from[2 * i + 1];
    std::swap(values, other);
  }
  return values[0];
}

// Encodes `count` blocks of y whose scale is fitted to their codes: scales to `wire`, codes one in a byte. after: what
// the codes decode to, or with `lost` what y loses by it.
void encode_fitted(const float* y, const Layout& layout, int count, uint8_t* wire, bool lost, uint8_t* codes,
                   float* after, Scales& scales) {
  const Levels& table = layout.levels;
  const int block = layout.block;
  alignas(64) float x[MAX_TILE], terms[MAX_TILE], scratch[MAX_TILE];
  measure(y, block, count, scales);
  for (int b = 0; b < count; ++b) {
    const Ints live = ~all(scales.marked[b]);
    const int32_t raw = scales.amax[b] >> 23, exponent = raw < 1 ? 1 : raw > 253 ? 253 : raw;
    const float down = float_of((254 - exponent) << 23), up = float_of(exponent << 23);
    for (int i = 0; i < block; i += WIDTH) {
      const Floats h = as_floats(as_bits(load_floats(y + b * block + i)) & live) * down;
      store(x + i, h);
      store(terms + i, h * h);
    }
    const float energy = tree_sum(terms, scratch, block);
    const float factor = energy > 0.0f ? std::sqrt(table.spread / energy) : 0.0f;
    float* levels = after + b * block;
    for (int i = 0; i < block; i += WIDTH) {
      const Floats h = load_floats(x + i);
      const Leveled found = find_level(h * factor, table.edges, table);
      store_bytes(codes + b * block + i, found.code);
      store(levels + i, found.value);
      store(terms + i, h * found.value);
    }
    const float product = tree_sum(terms, scratch, block);
    float over = energy, under = product;
    if (table.fit == FitId::least_squares) {
      for (int i = 0; i < block; i += WIDTH) store(terms + i, load_floats(levels + i) * load_floats(levels + i));
      over = product, under = tree_sum(terms, scratch, block);
    }
    const float s = over > 0.0f ? over / under * up : 0.0f;
    scales.amax[b] = bits_of(s < LARGEST ? s : LARGEST);
  }
  round_scales(layout, 1.0f, true, count, scales);
  std::memcpy(wire, scales.bytes, static_cast<size_t>(count) * scale_bytes(layout.scale));
  scale_values(layout, count, scales);
  for (int b = 0; b < count; ++b) {
    for (int i = b * block; i < (b + 1) * block; i += WIDTH) {
      const Floats sent = load_floats(after + i) * scales.s[b];
      store(after + i, lost ? load_floats(y + i) - sent : sent);
    }
  }
}

}  // namespace
}  // namespace commq::cpu
