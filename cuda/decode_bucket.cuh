// decode_bucket: codes and scales are read once and the elements written (or added to) once.
#pragma once

#include "families.cuh"
#include "source.cuh"

namespace commq::cuda {

template <class Codec, bool Rotated>
__global__ void __launch_bounds__(THREADS, Rotated ? 4 : 5)
    decode_bucket_kernel(const __grid_constant__ DecodeArgs args, int64_t first_row, bool aligned) {
  const Layout& layout = args.layout;
  const int64_t i = thread_element(), row = first_row + blockIdx.y;
  const Place at = place(layout, row, i, aligned && layout.chunk_numel % 8 == 0);
  if constexpr (IS_LEVELS<Codec>) Codec::prepare(layout);
  float x[V] = {};
  if (i < layout.chunk_numel) {
    Source<Codec> source;
    source.load(args.wire + row * layout.row_stride, layout, i, aligned);
    source.decode(layout, x);
  }
  if constexpr (Rotated) {
    __shared__ Exchange exchange;
    unrotate(x, args.rotation, args.signs, i, exchange);
  }
  if (args.accumulate) {
    float old[V];
    load(args.out, args.out_dtype, at, old);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fadd_rn(old[j], x[j]);
  }
  store(args.out, args.out_dtype, at, x);
}

template <class Codec>
void launch_decode_bucket(const DecodeArgs& args, const Launch& launch) {
  if constexpr (!std::is_same_v<Codec, Raw>)
    if (args.rotation) return launch(decode_bucket_kernel<Codec, true>, args);
  launch(decode_bucket_kernel<Codec, false>, args);
}

}  // namespace commq::cuda
