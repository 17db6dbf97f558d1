// Random bits of a tile, in one loop over counters.
#pragma once

#include "codec.h"
#include "numerics.h"

namespace commq::cpu {
namespace {

// Four words, eight 16-bit halves, for each of the `count` counters; see numerics.h.
void random_words(const uint64_t* __restrict index, int count, const Random& random, uint32_t* __restrict words) {
  for (int i = 0; i < count; ++i) {
    const Philox philox(index[i], random.step, random.seed, random.stream);
    for (int word = 0; word < 4; ++word) words[4 * i + word] = philox.words[word];
  }
}

}  // namespace
}  // namespace commq::cpu
