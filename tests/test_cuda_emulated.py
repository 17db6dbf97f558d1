"""The CUDA kernels give the reference's bytes, where there is no GPU: compiled for the CPU and run thread by thread.

emulated/ has what the kernels need of CUDA. Misaligned accesses, and warps or CTAs that do not all come to a meeting,
end the process. Not seen here: what the compiler for the GPU does, races, and the conversions to and from fp8 that are
one instruction from sm_89 on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch

from commq.codecs import native, reference
from commq.codecs.formats import get_format
from commq.codecs.reference import Coding
from commq.codecs.wire import Layout
from test_codecs_same_bytes import ROUND, check

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "emulated"
REPLACED = [
    (
        "launch.cuh",
        "kernel<<<grid, THREADS, 0, stream>>>(args, first, aligned);",
        "::launch(grid, THREADS, [&] { kernel(args, first, aligned); });",
    ),
    (
        "bits.cuh",
        'asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));',
        "larger = a != a || b != b ? a + b : a > b ? a : b;",
    ),
    (
        "bits.cuh",
        'asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));',
        "result = (word & mask) ^ bits;",
    ),
    ("ops.cpp", "STABLE_TORCH_LIBRARY(commq, ops)", "STABLE_TORCH_LIBRARY(commq_emulated, ops)"),
    ("ops.cpp", "STABLE_TORCH_LIBRARY_IMPL(commq, CPU, ops)", "STABLE_TORCH_LIBRARY_IMPL(commq_emulated, CPU, ops)"),
]
"""What is not C++, and the ops' namespace, which the library has taken."""


@pytest.fixture(autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "cuda", folder, dirs_exist_ok=True)
    for name, old, new in REPLACED:
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name}: expected once: {old}"
        (folder / name).write_text(text.replace(old, new))
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O0", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment"]
    flags += ["-fno-sanitize-recover=alignment", f"-I{SHIM}", f"-I{folder}"]
    ops = ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DCOMMQ_BUILT_FROM="emulated"']
    ops += [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    kernels = ["-x", "c++", "-include", "cuda_shim.h"]
    sources = dict.fromkeys((*folder.glob("*.cu"), SHIM / "emulator.cpp"), kernels) | {folder / "ops.cpp": ops}

    def compiled(source: Path) -> str:
        out = str(folder / f"{source.name}.o")
        _run([*compiler.split(), *flags, *sources[source], "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = str(folder / "emulated.so")
    _run(
        [
            *compiler.split(),
            "-shared",
            "-fsanitize=alignment",
            *objects,
            "-o",
            library,
            f"-L{torch_folder}/lib",
            "-ltorch_cpu",
        ]
    )
    torch.ops.load_library(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encode_bucket", "decode_bucket", "decode_sum", "decode_sum_encode"):
        monkeypatch.setitem(native._OPS, name, getattr(torch.ops.commq_emulated, name).default)
    check(range(20 * ROUND, 23 * ROUND), native, "cpu")
    _check_means_of_signs()


def _check_means_of_signs() -> None:
    """Around the sums that the usual, shorter way to a block's mean |x| may take, whole blocks and a part of one."""
    numel = 2 * 4096 + 1040
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    for block, scale in product((16, 128, 512, 1024, 4096), ("fp32", "bf16")):
        layout = Layout(get_format("sign", block=block, scale=scale), numel)
        for exponent in (-149, -126, -66, -64, -52, -40, 0, 46, 58, 60, 64, 90, 120):
            scaled = x * 2.0**exponent
            scaled[1024:2048] = 0.0
            scaled[::777] = 0.0
            found, expected = (torch.zeros(1, layout.chunk_bytes, dtype=torch.uint8) for _ in range(2))
            native.encode_bucket(scaled, found, layout, Coding())
            reference.encode_bucket(scaled, expected, layout, Coding())
            assert torch.equal(found, expected), f"{layout.format} * 2**{exponent}"
