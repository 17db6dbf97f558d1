// Vectors of the widest registers that the including file's instruction set has, in GCC's vector extensions: the
// operators are the compiler's, only loads and stores of narrow integers are spelled out. The including file says which
// set by COMMQ_AVX512 or COMMQ_AVX2 (a target pragma does not reach the preprocessor). Blocks are multiples of 16
// elements, so whole vectors always fit. Internal linkage throughout: code for one instruction set is never linked
// in place of another's.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define COMMQ_INLINE inline __attribute__((always_inline))

namespace commq::cpu {
namespace {

#if defined(COMMQ_AVX512)
constexpr int WIDTH = 16;
#elif defined(COMMQ_AVX2)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));

COMMQ_INLINE Floats all(float x) { return x - Floats{}; }
COMMQ_INLINE Ints all(int32_t x) { return x - Ints{}; }

COMMQ_INLINE Floats load_floats(const void* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

COMMQ_INLINE Ints load_ints(const void* from) {
  Ints x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

COMMQ_INLINE void store(void* to, Floats x) { std::memcpy(to, &x, sizeof x); }
COMMQ_INLINE void store(void* to, Ints x) { std::memcpy(to, &x, sizeof x); }

COMMQ_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

#if defined(COMMQ_AVX512) || defined(COMMQ_AVX2)
COMMQ_INLINE int32_t largest_of_eight(__m256i x) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
#endif

// Narrow integers: loads extend with zeros, stores keep the low bits.
#if defined(COMMQ_AVX512)

constexpr __mmask16 ALL = 0xFFFF;  // the forms without a mask make GCC warn about its own headers

COMMQ_INLINE Ints load_bytes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Ints>(_mm512_maskz_cvtepu8_epi32(ALL, bytes));
}
COMMQ_INLINE Ints load_halves(const void* from) {
  const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return reinterpret_cast<Ints>(_mm512_maskz_cvtepu16_epi32(ALL, halves));
}
COMMQ_INLINE void store_bytes(uint8_t* to, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(ALL, reinterpret_cast<__m512i>(x)));
}
COMMQ_INLINE void store_halves(void* to, Ints x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(ALL, reinterpret_cast<__m512i>(x)));
}
COMMQ_INLINE int32_t largest_of(Ints x) {
  __m256i halves[2];
  std::memcpy(halves, &x, sizeof halves);
  return largest_of_eight(_mm256_max_epi32(halves[0], halves[1]));
}

#elif defined(COMMQ_AVX2)

COMMQ_INLINE Ints load_bytes(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
COMMQ_INLINE Ints load_halves(const void* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
COMMQ_INLINE void store_bytes(uint8_t* to, Ints x) {
  const __m256i low_bytes = _mm256_set1_epi32(0x0C080400);
  const __m256i fours = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(x), low_bytes);
  const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), eight);
}
COMMQ_INLINE void store_halves(void* to, Ints x) {
  const __m256i low_halves = _mm256_set1_epi64x(0x0D0C090805040100);
  const __m256i fours = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(x), low_halves);
  const __m256i eight = _mm256_permute4x64_epi64(fours, 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(eight));
}
COMMQ_INLINE int32_t largest_of(Ints x) { return largest_of_eight(reinterpret_cast<__m256i>(x)); }

#else

typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

COMMQ_INLINE Ints load_bytes(const uint8_t* from) { return Ints{from[0], from[1], from[2], from[3]}; }
COMMQ_INLINE Ints load_halves(const void* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, Ints);
}
COMMQ_INLINE void store_bytes(uint8_t* to, Ints x) {
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(x[i]);
}
COMMQ_INLINE void store_halves(void* to, Ints x) {
  const Halves halves = __builtin_convertvector(x, Halves);
  std::memcpy(to, &halves, sizeof halves);
}
COMMQ_INLINE int32_t largest_of(Ints x) {
  const int32_t a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}

#endif

}  // namespace
}  // namespace commq::cpu
