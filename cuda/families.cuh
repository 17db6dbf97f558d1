// The kernels' launchers, instantiated for each kind of code in the .cu files named after the families.
#pragma once

#include "launch.cuh"

namespace commq::cuda {

struct Raw;  // fp32, bf16 and fp16 elements: no blocks, no scales

template <int Hop>
struct LevelCodes;  // of tables of levels
using MessageLevels = LevelCodes<0>;
using AnswerLevels = LevelCodes<1>;

template <class Codec>
void launch_encode_bucket(const EncodeArgs& args, const Launch& launch);

template <class Codec>
void launch_decode_bucket(const DecodeArgs& args, const Launch& launch);

template <class Codec>
void launch_decode_sum_encode(const DecodeSumEncodeArgs& args, const Launch& launch);

}  // namespace commq::cuda
