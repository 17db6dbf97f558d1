#include "encode_bucket.cuh"

namespace commq::cuda {

template void launch_encode_bucket<Int8>(const EncodeArgs&, const Launch&);
template void launch_encode_bucket<Int4>(const EncodeArgs&, const Launch&);
template void launch_encode_bucket<Int2>(const EncodeArgs&, const Launch&);
template void launch_encode_bucket<Sign>(const EncodeArgs&, const Launch&);

}  // namespace commq::cuda
