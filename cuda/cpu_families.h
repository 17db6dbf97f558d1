// The codec families over tiles: each stage is a loop over floats that stay in the first-level cache; memory is read
// by the first stage of a tile and written by the last. Included once for each instruction set.
#pragma once

#include <cfenv>

#include "codec.h"
#include "cpu_feedback.h"
#include "cpu_rotation.h"
#include "cpu_tile.h"

namespace commq::cpu {
namespace {

// The pool's threads may flush subnormals (torch.set_flush_denormal) or round otherwise: not while this lives.
class StandardFloats {
 public:
  StandardFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardFloats() { std::fesetenv(&before_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
  std::fenv_t before_;
};

constexpr int residual_bytes(ResidualId kind) {
  switch (kind) {
    case ResidualId::none: return 0;
    case ResidualId::f32: return 4;
    case ResidualId::bf16: return 2;
    case ResidualId::int8: return 1;
  }
  return 0;
}

// Asks for what the next tile will read, while this one is computed.
void prefetch(const void* place, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(place) + i);
}

// One tile of a bucket; `start` is its first element's number, `valid` of its elements are in the tensor.
struct Part {
  const Tile& tile;
  int64_t start;
  int valid;
};

Window x_window(const EncodeArgs& args, const Part& part) {
  const int bytes = dtype_bytes(args.x_dtype);
  return {static_cast<const uint8_t*>(args.x) + part.start * bytes, part.valid * bytes,
          whole_vectors(part.tile.n) * bytes};
}

void encode_part(const EncodeArgs& args, const Part& part, const float* y, bool lost, Buffers& buffers) {
  const int64_t block = part.start / args.layout.block;
  encode_tile(y, args.wire + part.tile.row * args.layout.row_stride, args.layout, part.tile.at, part.tile.n,
              args.random, {args.blocks, block, block, part.start}, lost, buffers);
}

void encode_plain(const EncodeArgs& args, const Part& part, Buffers& buffers) {
  const int n = whole_vectors(part.tile.n);
  load_scaled(x_window(args, part).data(), args.x_dtype, args.prescale, n, buffers.h);
  fill(buffers.h, part.valid, n, 0.0f);
  if (args.rotation > 0) rotate(buffers.h, n, args.rotation, args.signs);
  encode_part(args, part, buffers.h, false, buffers);
}

// With error feedback; at least one of the tile's elements is in the tensor.
void encode_fed_back(const EncodeArgs& args, const Part& part, Buffers& buffers) {
  const int n = part.tile.n, valid = part.valid, block = args.layout.block;
  const int covered = (valid + block - 1) / block * block, bytes = residual_bytes(args.residual_kind);
  OutWindow e(static_cast<uint8_t*>(args.residual) + part.start * bytes, valid * bytes, covered * bytes);
  float* scales = args.residual_kind == ResidualId::int8 ? args.residual_scales + part.start / block : nullptr;
  const Residual residual{args.residual_kind, e.data(), scales, block, args.decay, args.gain};
  load_compensated(x_window(args, part).data(), args.x_dtype, args.prescale, residual, covered, buffers.h);
  fill(buffers.h, valid, n, 0.0f);
  float* after = buffers.after;
  if (args.rotation == 0) {
    encode_part(args, part, buffers.h, true, buffers);
  } else {
    std::memcpy(buffers.y, buffers.h, 4 * static_cast<size_t>(n));
    rotate(buffers.y, n, args.rotation, args.signs);
    encode_part(args, part, buffers.y, false, buffers);
    unrotate(after, n, args.rotation, args.signs);
    for (int i = 0; i < n; i += WIDTH) store(after + i, lost_of(load_floats(buffers.h + i), load_floats(after + i)));
  }
  fill(after, valid, covered, 0.0f);
  update_residual(residual, after, covered, buffers.y);
  e.close();
}

void prefetch_inputs(const EncodeArgs& args, int64_t start, int n) {
  const int x_bytes = dtype_bytes(args.x_dtype), e_bytes = residual_bytes(args.residual_kind);
  prefetch(static_cast<const uint8_t*>(args.x) + start * x_bytes, n * x_bytes);
  if (e_bytes > 0) prefetch(static_cast<const uint8_t*>(args.residual) + start * e_bytes, n * e_bytes);
}

void encode_bucket_tiles(const EncodeArgs& args, int64_t begin, int64_t end) {
  const StandardFloats standard;
  const Grid tiles = grid(args);
  Buffers buffers;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(tiles, index);
    const int64_t start = tile.row * args.layout.chunk_numel + tile.at;
    const Part part{tile, start, tile.valid(start, args.layout.numel)};
    if (start + 2 * tile.n <= args.layout.numel) prefetch_inputs(args, start + tile.n, tile.n);
    if (args.residual_kind == ResidualId::none || part.valid == 0)
      encode_plain(args, part, buffers);
    else
      encode_fed_back(args, part, buffers);
  }
}

void decode_bucket_tiles(const DecodeArgs& args, int64_t begin, int64_t end) {
  const StandardFloats standard;
  const Layout& layout = args.layout;
  const Grid tiles = grid(args);
  const int bytes = dtype_bytes(args.out_dtype);
  Buffers buffers;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(tiles, index);
    const int64_t start = tile.row * layout.chunk_numel + tile.at;
    const int valid = tile.valid(start, layout.numel);
    if (valid == 0) continue;
    const uint8_t* row = args.wire + tile.row * layout.row_stride;
    if (args.rotation == 0 && args.out_dtype == Dtype::f32 && valid == tile.n && valid % 16 == 0) {
      float* out = static_cast<float*>(args.out) + start;
      decode_tile(row, layout, tile.at, tile.n, args.accumulate, buffers, out);
      continue;
    }
    decode_tile(row, layout, tile.at, tile.n, false, buffers, buffers.y);
    if (args.rotation > 0) unrotate(buffers.y, tile.n, args.rotation, args.signs);
    OutWindow out(static_cast<uint8_t*>(args.out) + start * bytes, valid * bytes, whole_vectors(valid) * bytes);
    with_dtype(args.out_dtype, [to = out.data(), from = buffers.y, valid, add = args.accumulate](auto type) {
      using T = decltype(type);
      for (int i = 0; i < valid; i += WIDTH) {
        const Floats x = load_floats(from + i);
        T::store(to, i, add ? T::load(to, i) + x : x);
      }
    });
    out.close();
  }
}

// Sum over the rows of the tile's elements, first row first.
void sum_tile(const uint8_t* wire, const Layout& layout, float divisor, const Tile& tile, Buffers& buffers,
              float* total) {
  for (int64_t k = 0; k < layout.rows; ++k)
    decode_tile(wire + k * layout.row_stride, layout, tile.at, tile.n, k > 0, buffers, total);
  if (divisor == 1.0f) return;
  for (int i = 0; i < tile.n; i += WIDTH) store(total + i, load_floats(total + i) / divisor);
}

void decode_sum_tiles(const DecodeSumArgs& args, int64_t begin, int64_t end) {
  const StandardFloats standard;
  const Grid tiles = grid(args);
  Buffers buffers;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(tiles, index);
    sum_tile(args.wire, args.layout, args.divisor, tile, buffers, buffers.h);
    std::memcpy(args.out + tile.at, buffers.h, 4 * static_cast<size_t>(tile.n));
  }
}

void decode_sum_encode_tiles(const DecodeSumEncodeArgs& args, int64_t begin, int64_t end) {
  const StandardFloats standard;
  const Layout& layout = args.answer_layout;
  const Grid tiles = grid(args);
  Buffers buffers;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(tiles, index);
    const int64_t block = tile.at / layout.block;
    const Numbering place{args.blocks, block, args.chunk * (layout.chunk_numel / layout.block) + block, tile.at};
    sum_tile(args.wire, args.layout, args.divisor, tile, buffers, buffers.h);
    if (args.residual == nullptr) {
      encode_tile(buffers.h, args.answer, layout, tile.at, tile.n, args.random, place, false, buffers);
      continue;
    }
    const int whole = whole_vectors(tile.n);
    OutWindow e(args.residual + tile.at, 4 * tile.n, 4 * whole);
    const Residual residual{ResidualId::f32, e.data(), nullptr, layout.block, 0.0f, 1.0f};
    for (int i = 0; i < whole; i += WIDTH)
      store(buffers.h + i, load_floats(buffers.h + i) + F32::load(e.data(), i));
    encode_tile(buffers.h, args.answer, layout, tile.at, tile.n, args.random, place, true, buffers);
    update_residual(residual, buffers.after, whole, buffers.y);
    e.close();
  }
}

}  // namespace
}  // namespace commq::cpu
