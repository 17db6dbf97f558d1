// The CPU kernels for the instruction set that the compiler targets by itself: SSE2 on x86, NEON on aarch64.
#include "cpu_families.h"

namespace commq::cpu {

const Kernels portable_kernels = {
    "portable", encode_bucket_tiles, decode_bucket_tiles, decode_sum_tiles, decode_sum_encode_tiles,
};

}  // namespace commq::cpu
