// The ops `torch.ops.commq.*`: schemas, checks and dispatch by device, against LibTorch's stable ABI.
//
// Kernels trust what is checked here: dtypes, devices, contiguity, and that every offset a Layout names stays inside
// the tensors. What the arguments mean is said in commq/codecs/reference.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "codec.h"
#include "numerics.h"

// Weak, since a CPU build of torch does not have it. It comes with libtorch.so of a CUDA build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace commq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;

// Where a call runs: all its tensors are on one device.
struct Device {
  bool cuda;
  int32_t index;

  explicit Device(const Tensor& tensor) : cuda(tensor.is_cuda()), index(tensor.get_device_index()) {}

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cuda() == cuda && tensor.get_device_index() == index, name,
                    ": on another device than the other tensors; move it there");
  }

  // The stream that work of this call belongs to.
  void* stream() const {
    void* stream = nullptr;
#ifdef USE_CUDA
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
#endif
    return stream;
  }
};

// A family's implementation for the device. Without CUDA code in the library CUDA tensors never get here.
template <class Args>
void run(const Device& device, const Args& args, void (*on_cpu)(const Args&), void (*on_cuda)(const Args&, void*)) {
  if (!device.cuda) return on_cpu(args);
  if (device.index == torch::stable::accelerator::getCurrentDeviceIndex()) return on_cuda(args, device.stream());
  const torch::stable::accelerator::DeviceGuard guard(device.index);
  on_cuda(args, device.stream());
}

#ifdef USE_CUDA
#define COMMQ_RUN(family, device, args) run(device, args, cpu::family, cuda::family)
#else
#define COMMQ_RUN(family, device, args) cpu::family(args)
#endif

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Double: return "float64";
    default: return "another dtype";
  }
}

// The data of a contiguous tensor of at least `numel` elements.
void* data(const Tensor& tensor, const char* name, const Device& device, ScalarType dtype, int64_t numel) {
  device.check(tensor, name);
  const ScalarType found = tensor.scalar_type();
  STD_TORCH_CHECK(found == dtype, name, ": found ", dtype_name(found), ", expected ", dtype_name(dtype));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected contiguous memory; call .contiguous()");
  STD_TORCH_CHECK(tensor.numel() >= numel, name, ": found ", tensor.numel(), " elements, expected ", numel);
  return tensor.data_ptr();
}

Dtype float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, ": found ", dtype_name(tensor.scalar_type()),
                      ", expected float32, bfloat16 or float16");
  }
  return Dtype::f32;
}

bool is_power(int64_t value, int64_t lowest, int64_t highest) {
  return value >= lowest && value <= highest && (value & (value - 1)) == 0;
}

float float_of(int64_t bits) {
  const auto word = static_cast<int32_t>(bits);
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// `numbers` from the 8th on: fit, bits of 1 / spread**2, and of each level.
Levels levels_of(const int64_t* numbers, int64_t size, const Layout& layout, const char* name) {
  const int64_t count = size - 9, bits = code_bits(layout.format);
  STD_TORCH_CHECK(count >= 2 && count <= 1 << bits && numbers[7] >= 0 && numbers[7] <= 2, name, ": ", count,
                  " levels with fit ", numbers[7], ", expected 2 to ", 1 << bits, " and fit 0 to 2");
  Levels table{};
  table.count = static_cast<int32_t>(count);
  table.fit = static_cast<FitId>(numbers[7]);
  table.spread = static_cast<float>(layout.block) * float_of(numbers[8]);
  for (int64_t k = 0; k < 16; ++k) table.levels[k] = float_of(numbers[9 + (k < count ? k : count - 1)]);
  for (int64_t k = 0; k < 15; ++k)
    table.edges[k] = k + 1 < count ? (table.levels[k] + table.levels[k + 1]) * 0.5f
                                   : std::numeric_limits<float>::infinity();
  return table;
}

// All numbers of a call are in one list, since a list costs the host as much as ten numbers in it, and a number of its
// own as much as six. `call` from `first` on: format, scale, block and group as 16-bit fields of one; numel, chunks,
// chunk_numel, scales_offset, groups_offset, chunk_bytes; and what levels_of takes, for formats with levels.
// `wire` has one row for each chunk, or, if `messages`, any number of messages about one chunk.
Layout layout_of(const Numbers& call, int64_t first, const Tensor& wire, const char* name, const Device& device,
                 bool messages) {
  const int64_t* numbers = call.data() + first;
  const int64_t size = static_cast<int64_t>(call.size()) - first;
  const bool leveled = size > 9;
  STD_TORCH_CHECK(size == 7 || leveled, name, ": a layout is 7 numbers, or more than 9, found ", size);
  const int64_t format = numbers[0] & 0xFFFF, scale = numbers[0] >> 16 & 0xFFFF;
  Layout layout{};
  layout.format = static_cast<FormatId>(format);
  layout.scale = static_cast<ScaleId>(scale);
  layout.block = static_cast<int32_t>(numbers[0] >> 32 & 0xFFFF);
  layout.group = static_cast<int32_t>(numbers[0] >> 48 & 0xFFFF);
  layout.numel = numbers[1];
  layout.chunk_numel = numbers[3];
  layout.scales_offset = numbers[4];
  layout.groups_offset = numbers[5];
  layout.chunk_bytes = numbers[6];

  const int64_t chunks = numbers[2], C = layout.chunk_numel;
  const auto last = static_cast<int64_t>(leveled ? FormatId::levels4 : FormatId::nvfp4);
  STD_TORCH_CHECK(format <= last && is_levels(layout.format) == leveled &&
                      scale <= static_cast<int64_t>(ScaleId::e4m3),
                  name, ": format ", format, " with scale ", scale, " is unknown");
  STD_TORCH_CHECK(layout.numel >= 0 && C >= 0 && chunks >= 1 && C <= INT64_MAX / 64 / chunks &&
                      layout.numel <= chunks * C,
                  name, ": ", layout.numel, " elements do not fit ", chunks, " chunks of ", C);
  if (leveled) layout.levels = levels_of(numbers, size, layout, name);
  if (!is_raw(layout.format)) {
    STD_TORCH_CHECK(is_power(layout.block, 16, 4096) && C % layout.block == 0, name, ": block ", layout.block,
                    " does not divide chunks of ", C, " elements");
    const bool grouped = layout.format == FormatId::nvfp4;
    STD_TORCH_CHECK(grouped ? layout.group == (layout.block > 256 ? layout.block : 256) && C % layout.group == 0
                            : layout.group == 0,
                    name, ": group ", layout.group, " does not suit the format");
    const bool mx = layout.format == FormatId::mxfp8 || layout.format == FormatId::mxfp4;
    const bool plain = layout.scale == ScaleId::fp32 || layout.scale == ScaleId::bf16;
    STD_TORCH_CHECK(mx ? layout.scale == ScaleId::e8m0 : grouped ? layout.scale == ScaleId::e4m3 : plain, name,
                    ": scale ", scale, " does not suit format ", format);
    const int64_t scales = C / layout.block * scale_bytes(layout.scale);
    const int64_t groups = grouped ? C / layout.group * 4 : 0;
    STD_TORCH_CHECK(layout.scales_offset >= C * code_bits(layout.format) / 8 &&
                        layout.groups_offset - layout.scales_offset >= scales &&
                        layout.chunk_bytes - layout.groups_offset >= groups && layout.scales_offset % 16 == 0 &&
                        layout.groups_offset % 16 == 0,
                    name, ": the sections of a row overlap or are not multiples of 16 bytes");
  } else {
    STD_TORCH_CHECK(layout.chunk_bytes == C * code_bits(layout.format) / 8, name, ": a raw row has ",
                    C * code_bits(layout.format) / 8, " bytes, found ", layout.chunk_bytes);
    layout.block = 16;
  }
  device.check(wire, name);
  const int64_t dim = wire.dim();
  STD_TORCH_CHECK(wire.scalar_type() == ScalarType::Byte && (dim == 1 || dim == 2), name,
                  ": expected uint8 rows, or one row");
  layout.rows = dim == 1 ? 1 : wire.size(0);
  layout.row_stride = dim == 1 ? 0 : wire.stride(0);
  const int64_t row_bytes = wire.size(dim - 1);
  STD_TORCH_CHECK(messages ? layout.rows >= 1 : layout.rows == chunks, name, ": found ", layout.rows,
                  " rows, expected ", messages ? 1 : chunks);
  STD_TORCH_CHECK(row_bytes >= layout.chunk_bytes && (wire.stride(dim - 1) == 1 || row_bytes <= 1), name,
                  ": found rows of ", row_bytes, " bytes, expected ", layout.chunk_bytes, " next to each other");
  return layout;
}

// ids and valid list the blocks of `chunk`, or of all chunks if it is negative.
Blocks blocks_of(const std::optional<Tensor>& ids, const std::optional<Tensor>& valid, const Layout& layout,
                 int64_t chunks, int64_t chunk, const Device& device) {
  if (!ids.has_value() || !valid.has_value() || is_raw(layout.format)) return {nullptr, nullptr};
  const int64_t per_chunk = layout.chunk_numel / layout.block;
  const int64_t needed = per_chunk * (chunk < 0 ? chunks : chunk + 1), start = chunk < 0 ? 0 : chunk * per_chunk;
  return {static_cast<const int64_t*>(data(*ids, "block ids", device, ScalarType::Long, needed)) + start,
          static_cast<const int32_t*>(data(*valid, "block lengths", device, ScalarType::Int, needed)) + start};
}

const float* signs_of(const std::optional<Tensor>& signs, int64_t rotation, const Layout& layout,
                      const Device& device) {
  if (rotation == 0) return nullptr;
  STD_TORCH_CHECK(is_power(rotation, 16, 1024) && layout.chunk_numel % rotation == 0 && !is_raw(layout.format),
                  "rotation ", rotation, ": expected a power of two from 16 to 1024 that divides the chunk of ",
                  layout.chunk_numel, " elements, and a format with blocks");
  if (!signs.has_value()) return nullptr;
  const void* pointer = data(*signs, "signs", device, ScalarType::Float, rotation);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, "signs: expected an address of a multiple of 16");
  return static_cast<const float*>(pointer);
}

// A coding's numbers: twice the run length of the rotation, or 0, plus 1 if rounding is stochastic; seed, stream, step.
constexpr int64_t CODING = 4;

Random random_of(const Numbers& call) {
  Random random{(call[0] & 1) != 0, static_cast<uint32_t>(call[1]), static_cast<uint32_t>(call[2]),
                static_cast<uint64_t>(call[3]), {}};
  for (uint32_t k = 0; random.stochastic && k < 10; ++k) {
    random.keys[2 * k] = random.seed + k * 0x9E3779B9u;
    random.keys[2 * k + 1] = random.stream + k * 0xBB67AE85u;
  }
  return random;
}

// call: coding, layout.
void encode_bucket(const Tensor& x, const Tensor& wire, const Numbers& call, double prescale,
                   const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_scales, double decay,
                   const std::optional<Tensor>& signs, const std::optional<Tensor>& ids,
                   const std::optional<Tensor>& valid) {
  const Device device(x);
  EncodeArgs args{};
  args.layout = layout_of(call, CODING, wire, "wire", device, false);
  args.wire = static_cast<uint8_t*>(wire.data_ptr());
  const int64_t numel = args.layout.numel;
  STD_TORCH_CHECK(x.numel() == numel, "x: found ", x.numel(), " elements, expected ", numel);
  args.x_dtype = float_dtype(x, "x");
  args.x = data(x, "x", device, x.scalar_type(), numel);
  args.prescale = static_cast<float>(prescale);
  if (residual.has_value()) {
    STD_TORCH_CHECK(!is_raw(args.layout.format), "residual: raw formats take none");
    const ScalarType dtype = residual->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char,
                    "residual: found ", dtype_name(dtype), ", expected float32, bfloat16 or int8");
    STD_TORCH_CHECK((dtype == ScalarType::Char) == residual_scales.has_value(),
                    "residual: int8 needs residual_scales, and nothing else has them");
    args.residual_kind = dtype == ScalarType::Float      ? ResidualId::f32
                         : dtype == ScalarType::BFloat16 ? ResidualId::bf16
                                                         : ResidualId::int8;
    args.residual = data(*residual, "residual", device, dtype, numel);
    if (residual_scales.has_value())
      args.residual_scales =
          static_cast<float*>(data(*residual_scales, "residual_scales", device, ScalarType::Float,
                                   (numel + args.layout.block - 1) / args.layout.block));
  }
  args.decay = static_cast<float>(decay);
  args.gain = static_cast<float>(1.0 - decay);
  args.random = random_of(call);
  args.rotation = static_cast<int32_t>(call[0] >> 1);
  args.signs = signs_of(signs, call[0] >> 1, args.layout, device);
  args.blocks = blocks_of(ids, valid, args.layout, args.layout.rows, -1, device);
  COMMQ_RUN(encode_bucket, device, args);
}

// call: run length of the rotation or 0, layout.
void decode_bucket(const Tensor& wire, const Numbers& call, const Tensor& out, const std::optional<Tensor>& signs,
                   bool accumulate) {
  const Device device(out);
  DecodeArgs args{};
  args.layout = layout_of(call, 1, wire, "wire", device, false);
  args.wire = static_cast<const uint8_t*>(wire.data_ptr());
  STD_TORCH_CHECK(out.numel() == args.layout.numel, "out: found ", out.numel(), " elements, expected ",
                  args.layout.numel);
  args.out_dtype = float_dtype(out, "out");
  args.out = data(out, "out", device, out.scalar_type(), args.layout.numel);
  args.rotation = static_cast<int32_t>(call[0]);
  args.signs = signs_of(signs, call[0], args.layout, device);
  args.accumulate = accumulate;
  COMMQ_RUN(decode_bucket, device, args);
}

// call: layout.
void decode_sum(const Tensor& wire, const Numbers& call, double divisor, const Tensor& out) {
  const Device device(wire);
  DecodeSumArgs args{};
  args.layout = layout_of(call, 0, wire, "wire", device, true);
  args.wire = static_cast<const uint8_t*>(wire.data_ptr());
  args.divisor = static_cast<float>(divisor);
  args.out = static_cast<float*>(data(out, "out", device, ScalarType::Float, args.layout.chunk_numel));
  COMMQ_RUN(decode_sum, device, args);
}

// call: coding, number of the chunk, layout. other: the answer's layout, if it is not the messages'.
void decode_sum_encode(const Tensor& wire, const Numbers& call, const Tensor& answer, double divisor,
                       const std::optional<Tensor>& residual, const std::optional<Numbers>& other,
                       const std::optional<Tensor>& ids, const std::optional<Tensor>& valid) {
  const Device device(wire);
  DecodeSumEncodeArgs args{};
  args.layout = layout_of(call, CODING + 1, wire, "wire", device, true);
  args.wire = static_cast<const uint8_t*>(wire.data_ptr());
  const Numbers& answers = other.has_value() ? *other : call;
  const int64_t first = other.has_value() ? 0 : CODING + 1;
  args.answer_layout = layout_of(answers, first, answer, "answer", device, true);
  args.answer = static_cast<uint8_t*>(answer.data_ptr());
  STD_TORCH_CHECK(args.answer_layout.rows == 1, "answer: found ", args.answer_layout.rows, " rows, expected 1");
  STD_TORCH_CHECK(args.layout.chunk_numel == args.answer_layout.chunk_numel, "answer: its chunks have ",
                  args.answer_layout.chunk_numel, " elements and the messages' ", args.layout.chunk_numel,
                  "; give both layouts the same numel, chunks and align");
  const int64_t chunk = call[CODING], chunks = answers[first + 2];
  STD_TORCH_CHECK(chunk >= 0 && chunk < chunks, "chunk ", chunk, ": expected 0 to ", chunks - 1);
  args.divisor = static_cast<float>(divisor);
  args.chunk = chunk;
  if (residual.has_value())
    args.residual =
        static_cast<float*>(data(*residual, "residual", device, ScalarType::Float, args.layout.chunk_numel));
  args.random = random_of(call);
  args.blocks = blocks_of(ids, valid, args.answer_layout, chunks, chunk, device);
  COMMQ_RUN(decode_sum_encode, device, args);
}

void implement(torch::stable::detail::StableLibrary& ops) {
  ops.impl("encode_bucket", TORCH_BOX(&encode_bucket));
  ops.impl("decode_bucket", TORCH_BOX(&decode_bucket));
  ops.impl("decode_sum", TORCH_BOX(&decode_sum));
  ops.impl("decode_sum_encode", TORCH_BOX(&decode_sum_encode));
}

}  // namespace

STABLE_TORCH_LIBRARY(commq, ops) {
  // An argument that is left out costs a third of one that is passed.
  ops.def(
      "encode_bucket(Tensor x, Tensor(a!) wire, int[] call, float prescale=1.0, Tensor(b!)? residual=None, "
      "Tensor(c!)? residual_scales=None, float decay=0.0, Tensor? signs=None, Tensor? ids=None, Tensor? valid=None) "
      "-> ()");
  ops.def(
      "decode_bucket(Tensor wire, int[] call, Tensor(a!) out, Tensor? signs=None, bool accumulate=False) -> ()");
  ops.def("decode_sum(Tensor wire, int[] call, float divisor, Tensor(a!) out) -> ()");
  ops.def(
      "decode_sum_encode(Tensor wire, int[] call, Tensor(a!) answer, float divisor, Tensor(b!)? residual=None, "
      "int[]? other=None, Tensor? ids=None, Tensor? valid=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(commq, CPU, ops) { implement(ops); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(commq, CUDA, ops) { implement(ops); }
#endif

}  // namespace commq

// What the library was built from, for build_info(): "torch 2.13.0; CPU only" or "torch 2.13.0; CUDA 13.0: 80 90".
extern "C" __attribute__((visibility("default"))) const char* commq_built_from() { return COMMQ_BUILT_FROM; }
