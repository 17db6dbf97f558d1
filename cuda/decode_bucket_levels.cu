#include "decode_bucket.cuh"

namespace commq::cuda {

template void launch_decode_bucket<MessageLevels>(const DecodeArgs&, const Launch&);

}  // namespace commq::cuda
