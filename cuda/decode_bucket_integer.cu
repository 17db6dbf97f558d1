#include "decode_bucket.cuh"

namespace commq::cuda {

template void launch_decode_bucket<Int8>(const DecodeArgs&, const Launch&);
template void launch_decode_bucket<Int4>(const DecodeArgs&, const Launch&);
template void launch_decode_bucket<Int2>(const DecodeArgs&, const Launch&);
template void launch_decode_bucket<Sign>(const DecodeArgs&, const Launch&);

}  // namespace commq::cuda
