#include "decode_sum.cuh"

namespace commq::cuda {

template void launch_decode_sum_encode<MessageLevels>(const DecodeSumEncodeArgs&, const Launch&);

}  // namespace commq::cuda
