#include "decode_sum.cuh"

namespace commq::cuda {

template void launch_decode_sum_encode<Int2>(const DecodeSumEncodeArgs&, const Launch&);
template void launch_decode_sum_encode<Sign>(const DecodeSumEncodeArgs&, const Launch&);

}  // namespace commq::cuda
