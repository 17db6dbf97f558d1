#include "encode_bucket.cuh"

namespace commq::cuda {

template void launch_encode_bucket<E4M3>(const EncodeArgs&, const Launch&);
template void launch_encode_bucket<E5M2>(const EncodeArgs&, const Launch&);
template void launch_encode_bucket<E2M1>(const EncodeArgs&, const Launch&);
template void launch_encode_bucket<Raw>(const EncodeArgs&, const Launch&);

}  // namespace commq::cuda
