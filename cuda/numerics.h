// Constants of the formats and Philox, for host and device code.
#pragma once

#include <cstdint>

#include "codec.h"

#ifdef __CUDACC__
#define COMMQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define COMMQ_HOST_DEVICE inline
#endif

namespace commq {

COMMQ_HOST_DEVICE constexpr bool is_raw(FormatId format) { return format <= FormatId::fp16; }

COMMQ_HOST_DEVICE constexpr bool is_levels(FormatId format) { return format >= FormatId::levels1; }

COMMQ_HOST_DEVICE constexpr int code_bits(FormatId format) {
  switch (format) {
    case FormatId::fp32: return 32;
    case FormatId::bf16:
    case FormatId::fp16: return 16;
    case FormatId::int8:
    case FormatId::e4m3:
    case FormatId::e5m2:
    case FormatId::mxfp8: return 8;
    case FormatId::int4:
    case FormatId::mxfp4:
    case FormatId::nvfp4: return 4;
    case FormatId::int2: return 2;
    case FormatId::sign: return 1;
    case FormatId::levels1: return 1;
    case FormatId::levels2: return 2;
    case FormatId::levels3: return 3;
    case FormatId::levels4: return 4;
  }
  return 0;
}

// 0, 4, 2, 1, 1 in the order of ScaleId; a table in a word costs a kernel less than a switch.
COMMQ_HOST_DEVICE constexpr int scale_bytes(ScaleId scale) { return 0x11240 >> (4 * static_cast<int>(scale)) & 7; }

// 128 random bits. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Philox4x32-10.
struct Philox {
  uint32_t words[4];

  COMMQ_HOST_DEVICE Philox(uint64_t element, uint64_t step, uint32_t key0, uint32_t key1)
      : words{static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32), static_cast<uint32_t>(step),
              static_cast<uint32_t>(step >> 32)} {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < 10; ++k) {
      round(key0, key1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }

  // With the keys of all rounds, which a kernel finds among its arguments.
  COMMQ_HOST_DEVICE Philox(uint64_t element, uint64_t step, const uint32_t (&keys)[20])
      : words{static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32), static_cast<uint32_t>(step),
              static_cast<uint32_t>(step >> 32)} {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < 10; ++k) round(keys[2 * k], keys[2 * k + 1]);
  }

 private:
  COMMQ_HOST_DEVICE void round(uint32_t key0, uint32_t key1) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * words[0];
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * words[2];
    words[0] = static_cast<uint32_t>(p1 >> 32) ^ words[1] ^ key0;
    words[2] = static_cast<uint32_t>(p0 >> 32) ^ words[3] ^ key1;
    words[1] = static_cast<uint32_t>(p1);
    words[3] = static_cast<uint32_t>(p0);
  }
};

}  // namespace commq
