"""The Triton kernels compile for a GPU where there is none: interpreted kernels accept what the compiler refuses."""

import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from codec_cases import SPIKES, SWEEP, Case, run_case
from commq.codecs.tiles import TileLayout

pytest.importorskip("triton", reason="triton is not installed; pip install triton")


class Hopper:
    """All that Triton asks a driver before it launches something."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiling(monkeypatch):
    """Kernels are compiled and not launched."""
    from triton.runtime import driver
    from triton.runtime.jit import KernelInterface

    from commq.codecs import triton_kernels

    if sys.platform != "linux" or torch.cuda.is_available():
        pytest.skip("where there is a GPU, its tests compile the kernels")
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: partial(self.warmup, grid=grid))
    monkeypatch.setattr(triton_kernels, "_device", lambda tensor: nullcontext())
    return triton_kernels


def one_of_each():
    """The first case of every kind and rounding."""
    cases = {}
    for number in range(2 * len(SWEEP)):
        case = Case(number)
        cases.setdefault((case.layout.format.kind, case.layout.format.fit, case.coding.rounding), number)
    return cases


@pytest.mark.parametrize("number", one_of_each().values(), ids=map(str, one_of_each()))
def test_every_kind_of_format_compiles(number, compiling):
    run_case(Case(number), compiling, "cpu", fuzz=False)


@pytest.mark.parametrize("number", (2, 3))
def test_kept_values_compile(number, compiling):
    """One of each scale."""
    run_case(Case(number, SPIKES), compiling, "cpu", fuzz=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("numel", (1000, 1 << 21))
def test_tiles_compile(numel, dtype, compiling):
    from commq.codecs import triton_pivots

    layout = TileLayout(numel)
    wire, x = torch.empty(layout.nbytes, dtype=torch.uint8), torch.zeros(numel, dtype=dtype)
    triton_pivots.encode_tiles(x, wire, layout)
    triton_pivots.decode_tiles(wire, layout, x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_rows_of_samples_compile(dtype, compiling):
    from commq.attach import triton_samples

    rows, x, delta = torch.zeros(6, 5000, dtype=dtype), torch.zeros(10000, dtype=dtype), torch.zeros(10000)
    ids = torch.arange(2)
    triton_samples.difference(x, rows, ids, delta)
    triton_samples.difference(x, rows[:2], None, delta)
    triton_samples.advance(rows, ids, delta, None, None, ids, rows, ids)
    triton_samples.advance(None, None, delta, x, ids, ids, rows[:2], None)
