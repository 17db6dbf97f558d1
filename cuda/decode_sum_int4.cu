#include "decode_sum.cuh"

namespace commq::cuda {

template void launch_decode_sum_encode<Int4>(const DecodeSumEncodeArgs&, const Launch&);

}  // namespace commq::cuda
