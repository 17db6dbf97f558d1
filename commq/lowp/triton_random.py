# mypy: allow-untyped-defs, allow-incomplete-defs
"""The bits of random.py in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from commq.codecs.triton_bits import random_words

_COUNTERS = 256


@triton.jit
def load_step(clock, WANTED: tl.constexpr):
    """Both halves of the step number; zeros, and no load, where nothing random is wanted."""
    step_low = 0
    step_high = 0
    if WANTED:
        step = tl.load(clock)
        step_low = step & 0xFFFFFFFF
        step_high = step >> 32
    return step_low, step_high


@triton.jit(do_not_specialize=["count", "seed", "stream"])
def _fill(out, clock, count, seed, stream, COUNTERS: tl.constexpr):
    """Each counter gives 8 elements."""
    step_low, step_high = load_step(clock, True)
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    w0, w1, w2, w3 = random_words(first + tl.arange(0, COUNTERS), seed, stream, step_low, step_high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [COUNTERS * 4])
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [COUNTERS * 8]).to(tl.int32)
    places = first * 8 + tl.arange(0, COUNTERS * 8)
    tl.store(out + places, bits, mask=places < count)


def fill(out: Tensor, clock: Tensor, seed: int, stream: int) -> None:
    """out: int32, on the device of `clock`."""
    count = out.numel()
    if count:
        _fill[(triton.cdiv(count, 8 * _COUNTERS),)](out, clock, count, seed, stream, COUNTERS=_COUNTERS)
