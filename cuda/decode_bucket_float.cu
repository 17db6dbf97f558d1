#include "decode_bucket.cuh"

namespace commq::cuda {

template void launch_decode_bucket<E4M3>(const DecodeArgs&, const Launch&);
template void launch_decode_bucket<E5M2>(const DecodeArgs&, const Launch&);
template void launch_decode_bucket<E2M1>(const DecodeArgs&, const Launch&);
template void launch_decode_bucket<Raw>(const DecodeArgs&, const Launch&);

}  // namespace commq::cuda
