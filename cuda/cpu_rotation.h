// The Walsh-Hadamard transform of runs of floats: butterflies at distance 1, 2, 4, ... as rotation.py orders them.
#pragma once

#include "cpu_numbers.h"

namespace commq::cpu {
namespace {

// Distances 1 and 2: four neighbours in registers.
void butterfly_neighbours(float* __restrict x, int n) {
  for (int i = 0; i < n; i += 4) {
    const float a = x[i] + x[i + 1], b = x[i] - x[i + 1];
    const float c = x[i + 2] + x[i + 3], d = x[i + 2] - x[i + 3];
    x[i] = a + c;
    x[i + 1] = b + d;
    x[i + 2] = a - c;
    x[i + 3] = b - d;
  }
}

// Distances half and 2 * half: four strips of `half` floats.
template <int Half>
void butterfly_strips(float* x, int n) {
  for (float* end = x + n; x < end; x += 4 * Half) {
    float* __restrict p = x;
    for (int i = 0; i < Half; ++i) {
      const float a = p[i] + p[i + Half], b = p[i] - p[i + Half];
      const float c = p[i + 2 * Half] + p[i + 3 * Half], d = p[i + 2 * Half] - p[i + 3 * Half];
      p[i] = a + c;
      p[i + Half] = b + d;
      p[i + 2 * Half] = a - c;
      p[i + 3 * Half] = b - d;
    }
  }
}

// One distance of at least 16.
void butterfly(float* x, int n, int half) {
  half &= ~15;
  for (float* end = x + n; x < end; x += 2 * half) {
    float* __restrict p = x;
    for (int i = 0; i < half; ++i) {
      const float a = p[i], b = p[i + half];
      p[i] = a + b;
      p[i + half] = a - b;
    }
  }
}

void hadamard(float* x, int n, int size) {
  butterfly_neighbours(x, n);
  butterfly_strips<4>(x, n);
  int half = 16;
  if (size >= 64) {
    butterfly_strips<16>(x, n);
    half = 64;
  }
  if (size >= 256) {
    butterfly_strips<64>(x, n);
    half = 256;
  }
  if (size >= 1024) {
    butterfly_strips<256>(x, n);
    half = 1024;
  }
  if (half < size) butterfly(x, n, half);
}

COMMQ_INLINE int log2_of(int power) { return __builtin_ctz(static_cast<unsigned>(power)); }

// Runs of `size` floats times one power of two, and times one sign for each position if there are signs: both exact.
void multiply(float* x, int n, float by, const float* signs, int size) {
  for (int i = 0; i < n; i += WIDTH) {
    const Floats scaled = load_floats(x + i) * by;
    store(x + i, signs == nullptr ? scaled : scaled * load_floats(signs + (i & (size - 1))));
  }
}

void rotate(float* x, int n, int size, const float* signs) {
  if (signs != nullptr) multiply(x, n, 1.0f, signs, size);
  hadamard(x, n, size);
  multiply(x, n, float_of((127 - log2_of(size) / 2) << 23), nullptr, size);
}

void unrotate(float* x, int n, int size, const float* signs) {
  hadamard(x, n, size);
  multiply(x, n, float_of((127 - (log2_of(size) + 1) / 2) << 23), signs, size);
}

}  // namespace
}  // namespace commq::cpu
