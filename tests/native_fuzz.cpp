// The CPU kernels on random arguments, for a build with sanitizers: every buffer is a heap block of exactly the length
// that ops.cpp asks for, full of random bytes, so that a read or write outside of it is an error.
//
//   native_fuzz KERNELS CASES SEED [FAMILY.BUFFER]
//
// KERNELS: portable, avx2 or avx512; exit code 77 says that this compiler or CPU does not have them. All get the same
// cases from the same seed. FAMILY.BUFFER, such as encode_bucket.x, is made one byte too short: that must be found.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>

#include "cpu_kernels.h"
#include "numerics.h"

namespace commq::cpu {
namespace {

std::mt19937_64 random_bits;
std::string shortened;

int64_t below(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }
bool coin() { return below(2) == 1; }

template <class T>
T pick(std::initializer_list<T> values) {
  return values.begin()[below(static_cast<int64_t>(values.size()))];
}

// Random bytes on the heap, the first of them `offset` bytes after an aligned address; null if there are none.
class Buffer {
 public:
  Buffer(const std::string& name, int64_t bytes, int64_t offset = 0) : offset_(bytes > 0 ? offset : 0) {
    if (bytes == 0) return;
    const int64_t length = offset + bytes - (name == shortened && bytes > 1);
    const int mask = pick({0xFF, 0xBF});  // without bit 6 in their bytes, floats of any dtype are finite
    block_.reset(new uint8_t[static_cast<size_t>(length)]);
    for (int64_t i = 0; i < length; ++i) block_[i] = static_cast<uint8_t>(random_bits()) & mask;
  }

  template <class T>
  operator T*() const {
    return static_cast<T*>(static_cast<void*>(block_.get() + offset_));
  }

 private:
  int64_t offset_;
  std::unique_ptr<uint8_t[]> block_;
};

int64_t wire_offset() { return pick<int64_t>({0, 1, 3}); }
int dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
int64_t ceil_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t wire_bytes(const Layout& layout) { return (layout.rows - 1) * layout.row_stride + layout.chunk_bytes; }

// Entries in a table of the layout's blocks, or none.
int64_t random_table(const Layout& layout) {
  return is_raw(layout.format) || coin() ? 0 : layout.rows * (layout.chunk_numel / layout.block);
}

ScaleId random_scale(FormatId format) {
  if (is_raw(format)) return ScaleId::none;
  if (format == FormatId::mxfp8 || format == FormatId::mxfp4) return ScaleId::e8m0;
  return format == FormatId::nvfp4 ? ScaleId::e4m3 : pick({ScaleId::fp32, ScaleId::bf16});
}

// The format's part of a layout; `place` adds the lengths.
Layout random_format() {
  Layout layout{};
  layout.format = static_cast<FormatId>(below(static_cast<int64_t>(FormatId::levels4) + 1));
  layout.scale = random_scale(layout.format);
  layout.block = is_raw(layout.format) ? 16 : 16 << below(9);
  layout.group = layout.format == FormatId::nvfp4 ? std::max(layout.block, 256) : 0;
  if (is_levels(layout.format)) {
    Levels& table = layout.levels;
    table.count = static_cast<int32_t>(2 + below((1 << code_bits(layout.format)) - 1));
    table.fit = pick({FitId::largest, FitId::unbiased, FitId::least_squares});
    table.spread = static_cast<float>(layout.block) / 3;
    for (int k = 0; k < 16; ++k)
      table.levels[k] = static_cast<float>(std::min(k, table.count - 1) * 2) / static_cast<float>(table.count - 1) - 1;
    for (int k = 0; k < 15; ++k) table.edges[k] = (table.levels[k] + table.levels[k + 1]) * 0.5f;
  }
  return layout;
}

// The offsets that wire.py computes.
void place(Layout& layout, int64_t numel, int64_t rows, int64_t align) {
  const int64_t C = ceil_to((numel + rows - 1) / rows, align), section = is_raw(layout.format) ? 1 : 16;
  layout.numel = numel;
  layout.rows = rows;
  layout.chunk_numel = C;
  layout.scales_offset = ceil_to(C * code_bits(layout.format) / 8, section);
  layout.groups_offset = layout.scales_offset + ceil_to(C / layout.block * scale_bytes(layout.scale), section);
  layout.chunk_bytes = layout.groups_offset + (layout.group > 0 ? ceil_to(C / layout.group * 4, section) : 0);
  layout.row_stride = layout.chunk_bytes + pick({0, 0, 3, 16});
}

Random random_rounding(FormatId format) {
  return {format != FormatId::fp32 && format != FormatId::fp16 && coin(), 1, 2, 3};
}

// What one case's calls have in common.
struct Case {
  const Kernels& kernels;
  Layout layout, answer;
  int32_t rotation = 0;
  const float* signs = nullptr;
};

// All tiles of the grid, in two calls as if by two threads.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  const int64_t tiles = grid(args).tiles(), middle = below(tiles + 1);
  kernel(args, middle, tiles);
  kernel(args, 0, middle);
}

void encode_bucket(const Case& c) {
  const int64_t numel = c.layout.numel, blocks = (numel + c.layout.block - 1) / c.layout.block;
  const int64_t table = random_table(c.layout);
  const Dtype dtype = pick({Dtype::f32, Dtype::bf16, Dtype::f16});
  const int kind = is_raw(c.layout.format) ? 0 : static_cast<int>(below(4));
  const int residual_bytes[] = {0, 4, 2, 1};  // by ResidualId
  const float decay = pick({0.0f, 0.7f});
  const Buffer x("encode_bucket.x", numel * dtype_bytes(dtype));
  const Buffer residual("encode_bucket.residual", numel * residual_bytes[kind]);
  const Buffer scales("encode_bucket.residual_scales", kind == static_cast<int>(ResidualId::int8) ? blocks * 4 : 0);
  const Buffer ids("encode_bucket.ids", table * 8), valid("encode_bucket.valid", table * 4);
  const Buffer wire("encode_bucket.wire", wire_bytes(c.layout), wire_offset());
  run(c.kernels.encode_bucket,
      {x, dtype, pick({1.0f, 0.5f}), static_cast<ResidualId>(kind), residual, scales, decay, 1.0f - decay, c.rotation,
       c.signs, random_rounding(c.layout.format), {ids, valid}, wire, c.layout});
}

void decode_bucket(const Case& c) {
  const Dtype dtype = pick({Dtype::f32, Dtype::bf16, Dtype::f16});
  const Buffer wire("decode_bucket.wire", wire_bytes(c.layout), wire_offset());
  const Buffer out("decode_bucket.out", c.layout.numel * dtype_bytes(dtype));
  run(c.kernels.decode_bucket, {wire, c.layout, c.rotation, c.signs, out, dtype, coin()});
}

void decode_sum(const Case& c) {
  Layout layout = c.layout;
  layout.rows = pick({1, 2, 5});
  const Buffer wire("decode_sum.wire", wire_bytes(layout), wire_offset());
  const Buffer out("decode_sum.out", layout.chunk_numel * 4);
  run(c.kernels.decode_sum, {wire, layout, pick({1.0f, 3.0f}), out});
}

void decode_sum_encode(const Case& c) {
  Layout layout = c.layout;
  layout.rows = pick({1, 2, 5});
  const int64_t table = random_table(c.answer);
  const Buffer wire("decode_sum_encode.wire", wire_bytes(layout), wire_offset());
  const Buffer residual("decode_sum_encode.residual", coin() ? layout.chunk_numel * 4 : 0);
  const Buffer ids("decode_sum_encode.ids", table * 8), valid("decode_sum_encode.valid", table * 4);
  const Buffer answer("decode_sum_encode.answer", wire_bytes(c.answer), wire_offset());
  run(c.kernels.decode_sum_encode,
      {wire, layout, pick({1.0f, 2.0f}), below(c.layout.rows), residual, random_rounding(c.answer.format),
       {ids, valid}, answer, c.answer});
}

void run_case(const Kernels& kernels) {
  Case c{kernels, random_format(), random_format()};
  if (!is_raw(c.layout.format) && coin()) c.rotation = 16 << below(7);
  const int64_t numel = pick<int64_t>({0, 1, 15, 17, 100, 1023, 4097, 20000, 1 + below(30000)});
  const int64_t rows = pick({1, 1, 2, 3, 8}), align = std::max({unit(c.layout), unit(c.answer), c.rotation});
  place(c.layout, numel, rows, align);
  place(c.answer, numel, rows, align);
  c.answer.rows = 1;
  const Buffer signs("signs", coin() ? c.rotation * 4 : 0);  // any floats will do
  c.signs = signs;
  encode_bucket(c);
  decode_bucket(c);
  decode_sum(c);
  decode_sum_encode(c);
}

// Null if this CPU, or code of this compiler, does not have them.
const Kernels* kernels_named(const std::string& name) {
#ifdef COMMQ_X86_KERNELS
  __builtin_cpu_init();
  if (name == avx512_kernels.name && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return &avx512_kernels;
  if (name == avx2_kernels.name && __builtin_cpu_supports("avx2")) return &avx2_kernels;
#endif
  return name == portable_kernels.name ? &portable_kernels : nullptr;
}

}  // namespace
}  // namespace commq::cpu

int main(int argc, char** argv) {
  using namespace commq::cpu;
  if (argc < 4) return 2;
  const Kernels* kernels = kernels_named(argv[1]);
  if (kernels == nullptr) return 77;
  const int cases = std::atoi(argv[2]);
  random_bits.seed(std::strtoull(argv[3], nullptr, 10));
  if (argc > 4) shortened = argv[4];
  for (int i = 0; i < cases; ++i) run_case(*kernels);
  std::printf("%s: %d cases\n", kernels->name, cases);
}
