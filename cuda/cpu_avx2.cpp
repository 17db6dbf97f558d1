// The CPU kernels for x86 with AVX2. What is included before the pragma may have external linkage: it is compiled for
// every x86, so it does not matter which file's copy the linker keeps. The rest is internal.
#include <cfenv>
#include <cstdint>
#include <cstring>

#include "codec.h"
#include "cpu_formats.h"
#include "cpu_kernels.h"
#include "numerics.h"

#ifdef COMMQ_X86_KERNELS

#define COMMQ_AVX2
#pragma GCC target("avx2")
#include "cpu_families.h"

namespace commq::cpu {

const Kernels avx2_kernels = {
    "avx2", encode_bucket_tiles, decode_bucket_tiles, decode_sum_tiles, decode_sum_encode_tiles,
};

}  // namespace commq::cpu

#endif
