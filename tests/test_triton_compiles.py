"""The Triton kernels compile for a GPU where there is none: interpreted kernels accept what the compiler refuses."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

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


@pytest.mark.parametrize(
    ("text", "rotation"),
    [
        ("int4/1x32+all:stochastic", 32),
        ("mxfp4/1x32:stochastic", 32),
        ("nvfp4/1x16:stochastic", 16),
        ("int8/128x128:stochastic", 0),
        ("int4/tensor", 0),
    ],
)
def test_quantizing_compiles_and_keeps_all_in_registers(text, rotation, compiling, monkeypatch):
    """Nothing is spilled, and a matrix and its transpose are loaded and stored 16 bytes at a time."""
    from triton.runtime.jit import KernelInterface

    from commq.lowp import triton_quantize
    from commq.lowp.operand import operand

    made = []

    def launcher(kernel, grid):
        return lambda *args, **options: made.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    x, key = torch.zeros(256, 384, dtype=torch.bfloat16), (1, 2, 3)
    for view in (x, x.T):
        triton_quantize.quantize(
            view, torch.empty(view.shape), operand(text), torch.tensor(3), rotation, rotation > 0, key
        )
    assert len(made) == (4 if text.startswith("nvfp4") else 2)
    for kernel in made:
        assert kernel.asm["ptx"].count("ld.global.v4.b32") and not stack_bytes(kernel)
    assert made[-1].asm["ptx"].count("st.global.v4.b32")


def stack_bytes(kernel):
    """What a compiled kernel keeps outside of registers, a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(usage.stdout.partition("STACK:")[2].split()[0])
