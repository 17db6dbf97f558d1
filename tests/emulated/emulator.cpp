// Runs the CUDA kernels of cuda/ on the CPU: the threads of a CTA are fibers that take turns, and meet at barriers.
//
// A warp whose lanes do not all come to a shuffle, or a CTA whose threads do not all come to __syncthreads, is stuck and
// aborts. Together with ops.cpp it makes a library whose CPU ops are the CUDA kernels.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "codec.h"
#include "cuda_shim.h"

dim3 threadIdx, blockIdx, blockDim;

namespace {

enum class State { ready, at_shuffle, at_barrier, ended };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  State state = State::ready;
  int shuffles = 0;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned current;
const std::function<void()>* body;
uint32_t words[2][1024];  // shuffles take turns: a lane is never two ahead of another

void enter() {
  (*body)();
  fibers[current].state = State::ended;
}

void stop(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

unsigned count(State state, unsigned first, unsigned end) {
  return static_cast<unsigned>(std::count_if(&fibers[first], &fibers[0] + end,
                                             [=](const Fiber& fiber) { return fiber.state == state; }));
}

// Everybody who waits in [first, end) may go on, if all of them do.
bool release(State state, unsigned first, unsigned end) {
  if (count(state, first, end) != end - first) return false;
  for (unsigned t = first; t < end; ++t) fibers[t].state = State::ready;
  return true;
}

void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.state = State::ready;
    fiber.shuffles = 0;
    makecontext(&fiber.context, enter, 0);
  }
  while (count(State::ended, 0, threads) != threads) {
    bool progress = false;
    for (current = 0; current < threads; ++current)
      if (fibers[current].state == State::ready) {
        threadIdx.x = current;
        swapcontext(&scheduler, &fibers[current].context);
        progress = true;
      }
    for (unsigned warp = 0; warp < threads; warp += 32) progress |= release(State::at_shuffle, warp, warp + 32);
    progress |= release(State::at_barrier, 0, threads);
    if (!progress) {
      std::fprintf(stderr, "CTA (%u, %u) is stuck: %u threads at a shuffle, %u at a barrier, %u ended\n", blockIdx.x,
                   blockIdx.y, count(State::at_shuffle, 0, threads), count(State::at_barrier, 0, threads),
                   count(State::ended, 0, threads));
      std::abort();
    }
  }
}

}  // namespace

uint32_t exchange_in_warp(uint32_t word, int distance) {
  const unsigned lane = current;
  uint32_t* slots = words[fibers[lane].shuffles++ & 1];
  slots[lane] = word;
  stop(State::at_shuffle);
  return slots[lane ^ static_cast<unsigned>(distance)];
}

void wait_for_block() { stop(State::at_barrier); }

void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = {threads, 1};
  if (fibers.size() < threads) fibers.resize(threads);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

namespace commq::cpu {

void encode_bucket(const EncodeArgs& args) { cuda::encode_bucket(args, nullptr); }
void decode_bucket(const DecodeArgs& args) { cuda::decode_bucket(args, nullptr); }
void decode_sum(const DecodeSumArgs& args) { cuda::decode_sum(args, nullptr); }
void decode_sum_encode(const DecodeSumEncodeArgs& args) { cuda::decode_sum_encode(args, nullptr); }

}  // namespace commq::cpu
