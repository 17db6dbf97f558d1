#include "encode_bucket.cuh"

namespace commq::cuda {

template void launch_encode_bucket<MessageLevels>(const EncodeArgs&, const Launch&);

}  // namespace commq::cuda
