// Between memory and vectors: dtypes of tensors, and codes of 1 to 4 bits on the wire. Tensors and rows of the
// wire may start at any byte.
#pragma once

#include "codec.h"
#include "cpu_numbers.h"

namespace commq::cpu {
namespace {

typedef uint16_t UnalignedU16 __attribute__((aligned(1), may_alias));
typedef uint32_t UnalignedU32 __attribute__((aligned(1), may_alias));
typedef uint64_t UnalignedU64 __attribute__((aligned(1), may_alias));

// store_where: numbers, not NaNs, where `where` is -1; memory stays as it was where it is 0.
struct F32 {
  static constexpr int bytes = 4;
  static constexpr float top = LARGEST;
  static COMMQ_INLINE Floats load(const uint8_t* from, int i) { return load_floats(from + 4 * i); }
  static COMMQ_INLINE void store(uint8_t* to, int i, Floats x) { cpu::store(to + 4 * i, x); }
  static COMMQ_INLINE void store_where(uint8_t* to, int i, Ints where, Floats x) {
    store(to, i, where ? x : load(to, i));
  }
};

struct Bf16 {
  static constexpr int bytes = 2;
  static constexpr float top = 0x1.fep127f;
  static COMMQ_INLINE Floats load(const uint8_t* from, int i) { return from_bf16(load_halves(from + 2 * i)); }
  static COMMQ_INLINE void store(uint8_t* to, int i, Floats x) { store_halves(to + 2 * i, to_bf16(x)); }
  static COMMQ_INLINE void store_where(uint8_t* to, int i, Ints where, Floats x) {
    store_halves(to + 2 * i, where ? round_bf16(x) : load_halves(to + 2 * i));
  }
};

struct F16 {
  static constexpr int bytes = 2;
  static COMMQ_INLINE Floats load(const uint8_t* from, int i) { return from_f16(load_halves(from + 2 * i)); }
  static COMMQ_INLINE void store(uint8_t* to, int i, Floats x) { store_halves(to + 2 * i, to_f16(x)); }
};

int dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Calls `work` with F32{}, Bf16{} or F16{}.
template <class Work>
void with_dtype(Dtype dtype, Work work) {
  switch (dtype) {
    case Dtype::f32:
      return work(F32{});
    case Dtype::bf16:
      return work(Bf16{});
    case Dtype::f16:
      return work(F16{});
  }
}

// x = number * scale for n elements, a multiple of 16. scale 1: every bit stays.
void load_scaled(const uint8_t* from, Dtype dtype, float scale, int n, float* x) {
  with_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    if (scale == 1.0f)
      for (int i = 0; i < n; i += WIDTH) store(x + i, T::load(from, i));
    else
      for (int i = 0; i < n; i += WIDTH) store(x + i, T::load(from, i) * scale);
  });
}

// Codes stand in bytes of which the low `bits` (1 to 4) count; n is a multiple of 16. As many codes as share a byte
// on the wire are read as one integer, in which neighbours, then pairs of neighbours, move together.
void pack(const uint8_t* __restrict codes, int bits, int n, uint8_t* __restrict wire) {
  if (bits == 4) {
    const auto* pairs = reinterpret_cast<const UnalignedU16*>(codes);
    for (int i = 0; i < n / 2; ++i) {
      const uint32_t word = pairs[i] & 0x0F0Fu;
      wire[i] = static_cast<uint8_t>(word | word >> 4);
    }
  } else if (bits == 3) {
    const auto* eights = reinterpret_cast<const UnalignedU64*>(codes);
    for (int i = 0; i < n / 8; ++i) {
      uint64_t word = eights[i] & 0x0707070707070707u;
      word = (word | word >> 5) & 0x003F003F003F003Fu;
      word = (word | word >> 10) & 0x00000FFF00000FFFu;
      word |= word >> 20;
      wire[3 * i] = static_cast<uint8_t>(word);
      wire[3 * i + 1] = static_cast<uint8_t>(word >> 8);
      wire[3 * i + 2] = static_cast<uint8_t>(word >> 16);
    }
  } else if (bits == 2) {
    const auto* fours = reinterpret_cast<const UnalignedU32*>(codes);
    for (int i = 0; i < n / 4; ++i) {
      uint32_t word = fours[i] & 0x03030303u;
      word = (word | word >> 6) & 0x000F000Fu;
      wire[i] = static_cast<uint8_t>(word | word >> 12);
    }
  } else {
    const auto* eights = reinterpret_cast<const UnalignedU64*>(codes);
    for (int i = 0; i < n / 8; ++i) {
      uint64_t word = eights[i] & 0x0101010101010101u;
      word = (word | word >> 7) & 0x0003000300030003u;
      word = (word | word >> 14) & 0x0000000F0000000Fu;
      wire[i] = static_cast<uint8_t>(word | word >> 28);
    }
  }
}

void unpack(const uint8_t* __restrict wire, int bits, int n, uint8_t* __restrict codes) {
  if (bits == 4) {
    auto* pairs = reinterpret_cast<UnalignedU16*>(codes);
    for (int i = 0; i < n / 2; ++i) {
      const uint32_t word = wire[i];
      pairs[i] = static_cast<uint16_t>((word | word << 4) & 0x0F0Fu);
    }
  } else if (bits == 3) {
    auto* eights = reinterpret_cast<UnalignedU64*>(codes);
    for (int i = 0; i < n / 8; ++i) {
      uint64_t word = wire[3 * i] | wire[3 * i + 1] << 8 | wire[3 * i + 2] << 16;
      word = (word | word << 20) & 0x00000FFF00000FFFu;
      word = (word | word << 10) & 0x003F003F003F003Fu;
      eights[i] = (word | word << 5) & 0x0707070707070707u;
    }
  } else if (bits == 2) {
    auto* fours = reinterpret_cast<UnalignedU32*>(codes);
    for (int i = 0; i < n / 4; ++i) {
      uint32_t word = wire[i];
      word = (word | word << 12) & 0x000F000Fu;
      fours[i] = (word | word << 6) & 0x03030303u;
    }
  } else {
    auto* eights = reinterpret_cast<UnalignedU64*>(codes);
    for (int i = 0; i < n / 8; ++i) {
      uint64_t word = wire[i];
      word = (word | word << 28) & 0x0000000F0000000Fu;
      word = (word | word << 14) & 0x0003000300030003u;
      eights[i] = (word | word << 7) & 0x0101010101010101u;
    }
  }
}

}  // namespace
}  // namespace commq::cpu
