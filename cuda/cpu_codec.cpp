// The CPU twin of the codec families: which kernels this machine runs, and torch's thread pool around them.
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "codec.h"
#include "cpu_kernels.h"

namespace commq::cpu {
namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 32768;  // fewer are not worth waking a thread; torch's own grain

// The best kernels this machine has, or those that COMMQ_CPU_ISA names: a test compares them. All give the same bytes.
const Kernels& choose() {
  const Kernels* can_run[3];
  int count = 0;
#ifdef COMMQ_X86_KERNELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    can_run[count++] = &avx512_kernels;
  if (__builtin_cpu_supports("avx2")) can_run[count++] = &avx2_kernels;
#endif
  can_run[count++] = &portable_kernels;
  const char* wanted = std::getenv("COMMQ_CPU_ISA");
  if (wanted == nullptr) return *can_run[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(wanted, can_run[i]->name) == 0) return *can_run[i];
    names += (i > 0 ? ", " : "") + std::string(can_run[i]->name);
  }
  throw std::runtime_error("COMMQ_CPU_ISA=" + std::string(wanted) + ": expected one that this machine runs: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

template <class Args>
struct Call {
  const Args& args;
  void (*tiles)(const Args&, int64_t begin, int64_t end);

  static void run(int64_t begin, int64_t end, void* self) {
    const Call& call = *static_cast<const Call*>(self);
    call.tiles(call.args, begin, end);
  }
};

template <class Args>
void spread(const Args& args, void (*tiles)(const Args&, int64_t, int64_t), int64_t work_per_element) {
  const Grid all = grid(args);
  if (all.tiles() == 0) return;
  const int64_t grain = ELEMENTS_PER_THREAD / (all.tile * work_per_element);
  Call<Args> call{args, tiles};
  if (torch_parallel_for(0, all.tiles(), grain > 1 ? grain : 1, Call<Args>::run, &call) != 0)
    throw std::runtime_error("commq: torch's thread pool failed");
}

}  // namespace

const char* instruction_set() { return kernels().name; }

void encode_bucket(const EncodeArgs& args) { spread(args, kernels().encode_bucket, 1); }
void decode_bucket(const DecodeArgs& args) { spread(args, kernels().decode_bucket, 1); }
void decode_sum(const DecodeSumArgs& args) { spread(args, kernels().decode_sum, args.layout.rows); }
void decode_sum_encode(const DecodeSumEncodeArgs& args) {
  spread(args, kernels().decode_sum_encode, args.layout.rows);
}

}  // namespace commq::cpu
