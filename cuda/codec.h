// The arguments of the codec families, as plain structs shared by the CUDA kernels and their CPU twins.
//
// commq/codecs/reference.py is the specification: same signatures, same bytes. Pointers are checked (dtype, device,
// contiguity, lengths) where the ops are bound, in ops.cpp; kernels trust them. Offsets are 64-bit everywhere.
#pragma once

#include <cstdint>

namespace commq {

enum class Dtype : int32_t { f32, bf16, f16 };

// Order is that of commq/codecs/formats.py FORMATS; then tables of levels with codes of 1 to 4 bits.
enum class FormatId : int32_t {
  fp32, bf16, fp16, int8, int4, int2, sign, e4m3, e5m2, mxfp8, mxfp4, nvfp4, levels1, levels2, levels3, levels4
};

enum class ScaleId : int32_t { none, fp32, bf16, e8m0, e4m3 };

// Order is that of `Fit` in formats.py.
enum class FitId : int32_t { largest, unbiased, least_squares };

// What codes stand for, if they index a table (formats levels1 to levels4).
struct Levels {
  int32_t count;
  FitId fit;
  float spread;      // block / spread**2 of the format, if the scale follows the codes
  float levels[16];  // ascending; from `count` on the last one again
  float edges[15];   // edges[k]: halfway between levels k and k + 1; infinite from there on
};

// One row of the wire is one chunk: codes | scales | group scales, at the byte offsets that wire.py computes.
struct Layout {
  FormatId format;
  ScaleId scale;
  int32_t block;  // elements that share a scale; a power of two, 16..4096
  int32_t group;  // elements that share a second fp32 scale (nvfp4), or 0
  int64_t numel;  // elements of the whole tensor, without padding
  int64_t rows;   // chunks in the buffer (W), or messages received (K)
  int64_t row_stride;
  int64_t chunk_numel;  // a multiple of block, group and the rotation
  int64_t scales_offset;
  int64_t groups_offset;
  int64_t chunk_bytes;  // the bytes between two sections are written as zero
  Levels levels;
};

// Random bits: Philox 4x32-10, key (seed, stream), counter (e / 8, e / 8 >> 32, step, step >> 32) with
// e = block_id * block + i; see philox.py. Raw formats count elements directly.
struct Random {
  bool stochastic;
  uint32_t seed;
  uint32_t stream;
  uint64_t step;
  uint32_t keys[20];  // of the rounds: seed + k * 0x9E3779B9 and stream + k * 0xBB67AE85, after each other
};

// Where a buffer's blocks stand in the global numbering; null: block g is number g, and numel says what is padding.
struct Blocks {
  const int64_t* ids;
  const int32_t* valid;  // elements of a block that are not padding; only sign with nearest rounding reads it
};

enum class ResidualId : int32_t { none, f32, bf16, int8 };

struct EncodeArgs {
  const void* x;  // numel elements
  Dtype x_dtype;
  float prescale;  // 1 means no multiplication
  ResidualId residual_kind;
  void* residual;          // numel elements, read and written
  float* residual_scales;  // int8 only: one for each block of the whole tensor
  float decay, gain;       // e <- decay * e + gain * (h - sent); decay == 0: no first term
  int32_t rotation;        // run length 16..1024, or 0
  const float* signs;      // `rotation` entries of +1 or -1, or null
  Random random;
  Blocks blocks;
  uint8_t* wire;
  Layout layout;
};

struct DecodeArgs {
  const uint8_t* wire;
  Layout layout;
  int32_t rotation;
  const float* signs;
  void* out;  // numel elements
  Dtype out_dtype;
  bool accumulate;  // out = cast(float(out) + x)
};

// `layout.rows` messages about one chunk; out: chunk_numel floats. divisor 1 means no division.
struct DecodeSumArgs {
  const uint8_t* wire;
  Layout layout;
  float divisor;
  float* out;
};

struct DecodeSumEncodeArgs {
  const uint8_t* wire;
  Layout layout;
  float divisor;
  int64_t chunk;    // number of the chunk: its first block is chunk * chunk_numel / block
  float* residual;  // chunk_numel floats of classic feedback, or null
  Random random;
  Blocks blocks;  // already sliced to this chunk
  uint8_t* answer;
  Layout answer_layout;  // rows == 1
};

namespace cpu {
void encode_bucket(const EncodeArgs&);
void decode_bucket(const DecodeArgs&);
void decode_sum(const DecodeSumArgs&);
void decode_sum_encode(const DecodeSumEncodeArgs&);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t. Throws std::runtime_error with the launch's error, if there is one.
void encode_bucket(const EncodeArgs&, void* stream);
void decode_bucket(const DecodeArgs&, void* stream);
void decode_sum(const DecodeSumArgs&, void* stream);
void decode_sum_encode(const DecodeSumEncodeArgs&, void* stream);
}  // namespace cuda

}  // namespace commq
