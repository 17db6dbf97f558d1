#include "decode_sum.cuh"

namespace commq::cuda {

template void launch_decode_sum_encode<E4M3>(const DecodeSumEncodeArgs&, const Launch&);
template void launch_decode_sum_encode<E5M2>(const DecodeSumEncodeArgs&, const Launch&);

}  // namespace commq::cuda
