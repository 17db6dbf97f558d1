// decode_bucket: codes and scales are read once and the elements written (or added to) once.
#pragma once

#include "families.cuh"
#include "source.cuh"

namespace commq::cuda {

// Plain: bfloat16, whole aligned rows, nothing to add to.
template <class Codec, bool Plain, bool Rotated>
__global__ void __launch_bounds__(THREADS, Rotated ? 5 : Plain ? 8 : 5)
    decode_bucket_kernel(const __grid_constant__ DecodeArgs args, int64_t first_row, bool some_aligned) {
  const bool aligned = Plain || some_aligned;
  const Layout& layout = args.layout;
  const int64_t i = thread_element(), row = first_row + blockIdx.y;
  const Place at = place(layout, row, i, aligned && layout.chunk_numel % 8 == 0);
  if constexpr (IS_LEVELS<Codec>) Codec::prepare(layout);
  float x[V] = {};
  if (i < layout.chunk_numel) {
    Source<Codec> source;
    source.load(args.wire + row * layout.row_stride, layout, layout.scale, source.offsets(layout, i), aligned);
    source.decode(layout.scale, x);
  }
  if constexpr (Rotated) {
    __shared__ Exchange exchange;
    unrotate(x, args.rotation, args.signs, i, exchange);
  }
  const Dtype dtype = Plain ? Dtype::bf16 : args.out_dtype;
  if (!Plain && args.accumulate) {
    float old[V];
    load(args.out, dtype, at, old);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __fadd_rn(old[j], x[j]);
  }
  store(args.out, dtype, at, x);
}

template <class Codec>
void launch_decode_bucket(const DecodeArgs& args, const Launch& launch) {
  if constexpr (std::is_same_v<Codec, Raw>) {
    launch(decode_bucket_kernel<Codec, false, false>, args);
  } else {
    const bool plain = launch.aligned && args.out_dtype == Dtype::bf16 && !args.accumulate;
    if (args.rotation)
      launch(decode_bucket_kernel<Codec, false, true>, args);
    else
      launch(plain ? decode_bucket_kernel<Codec, true, false> : decode_bucket_kernel<Codec, false, false>, args);
  }
}

}  // namespace commq::cuda
