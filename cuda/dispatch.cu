// Which kernel a call needs, and how its chunks are covered.
#include "families.cuh"
#include "codes.cuh"

namespace commq::cuda {

namespace {

// family(Codec) for the kind of code that a format has.
template <class Family>
void with_codec(FormatId format, Family family) {
  switch (format) {
    case FormatId::fp32:
    case FormatId::bf16:
    case FormatId::fp16: return family(static_cast<Raw*>(nullptr));
    case FormatId::int8: return family(static_cast<Int8*>(nullptr));
    case FormatId::int4: return family(static_cast<Int4*>(nullptr));
    case FormatId::int2: return family(static_cast<Int2*>(nullptr));
    case FormatId::sign: return family(static_cast<Sign*>(nullptr));
    case FormatId::e4m3:
    case FormatId::mxfp8: return family(static_cast<E4M3*>(nullptr));
    case FormatId::e5m2: return family(static_cast<E5M2*>(nullptr));
    case FormatId::mxfp4:
    case FormatId::nvfp4: return family(static_cast<E2M1*>(nullptr));
    case FormatId::levels1:
    case FormatId::levels2:
    case FormatId::levels3:
    case FormatId::levels4: return family(static_cast<MessageLevels*>(nullptr));
  }
}

}  // namespace

void encode_bucket(const EncodeArgs& args, void* stream) {
  const Layout& layout = args.layout;
  const bool all = aligned(args.x) && aligned(args.residual) && aligned(args.wire, layout);
  const Launch launch{layout.chunk_numel, layout.rows, all, static_cast<cudaStream_t>(stream)};
  with_codec(layout.format,
             [&](auto* codec) { launch_encode_bucket<std::remove_pointer_t<decltype(codec)>>(args, launch); });
}

void decode_bucket(const DecodeArgs& args, void* stream) {
  const bool all = aligned(args.out) && aligned(args.wire, args.layout);
  const Launch launch{args.layout.chunk_numel, args.layout.rows, all, static_cast<cudaStream_t>(stream)};
  with_codec(args.layout.format,
             [&](auto* codec) { launch_decode_bucket<std::remove_pointer_t<decltype(codec)>>(args, launch); });
}

void decode_sum_encode(const DecodeSumEncodeArgs& args, void* stream) {
  const bool all = aligned(args.wire, args.layout) && aligned(args.answer) && aligned(args.residual);
  const Launch launch{args.answer_layout.chunk_numel, 1, all, static_cast<cudaStream_t>(stream)};
  with_codec(args.layout.format,
             [&](auto* codec) { launch_decode_sum_encode<std::remove_pointer_t<decltype(codec)>>(args, launch); });
}

// The sum in float32 is an answer in the raw format fp32.
void decode_sum(const DecodeSumArgs& args, void* stream) {
  Layout answer = args.layout;
  answer.format = FormatId::fp32;
  answer.scale = ScaleId::none;
  answer.rows = 1;
  decode_sum_encode({args.wire, args.layout, args.divisor, 0, nullptr, Random{}, Blocks{},
                     reinterpret_cast<uint8_t*>(args.out), answer},
                    stream);
}

}  // namespace commq::cuda
