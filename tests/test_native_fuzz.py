"""The CPU kernels stay inside their buffers, and C++'s rules, on random arguments: native_fuzz.cpp with sanitizers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "cuda"
SOURCES = [TESTS / "native_fuzz.cpp", *(KERNELS / f"cpu_{name}.cpp" for name in ("portable", "avx2", "avx512"))]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [*SANITIZE, "-O1", "-g1", "-std=c++17", "-ffp-contract=off", "-I", str(KERNELS)]

CASES, SEED = 1000, 1
NOT_SUPPORTED = 77
"""The driver's exit code for kernels that this CPU or compiler does not have."""

BUFFERS = {
    "encode_bucket": ("x", "residual", "residual_scales", "ids", "valid", "wire"),
    "decode_bucket": ("wire", "out"),
    "decode_sum": ("wire", "out"),
    "decode_sum_encode": ("wire", "residual", "ids", "valid", "answer"),
}
"""What each family of kernels reads and writes, by its name in the driver; besides, there are the `signs`."""

all_kernels = pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def find_compiler(folder: Path) -> list[str]:
    """A compiler whose sanitized programs run here; skips the test if there is none."""
    compilers = [os.environ.get("CXX"), shutil.which("g++"), shutil.which("clang++")]
    (folder / "empty.cpp").write_text("int main() {}\n")
    reason = "needs a C++ compiler: g++ or clang++, or CXX"
    for compiler in map(shlex.split, filter(None, compilers)):
        built = run(*compiler, *SANITIZE, folder / "empty.cpp", "-o", folder / "empty")
        done = built if built.returncode else run(folder / "empty")
        if done.returncode == 0:
            return compiler
        error = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        reason = f"needs the address and undefined sanitizers of {shlex.join(compiler)}: {error}"
    pytest.skip(reason)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native_fuzz")
    compiler = find_compiler(folder)

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        done = run(*compiler, *FLAGS, "-c", source, "-o", out)
        assert done.returncode == 0, done.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    linked = run(*compiler, *SANITIZE, *objects, "-o", folder / "native_fuzz")
    assert linked.returncode == 0, linked.stderr
    return folder / "native_fuzz"


def fuzz(driver: Path, kernels: str, *shortened: str) -> subprocess.CompletedProcess[str]:
    done = run(driver, kernels, str(CASES), str(SEED), *shortened)
    if done.returncode == NOT_SUPPORTED:
        pytest.skip(f"this CPU or compiler does not have the {kernels} kernels")
    return done


@all_kernels
def test_kernels_stay_inside_their_buffers(driver, kernels):
    done = fuzz(driver, kernels)
    assert (done.returncode, done.stdout) == (0, f"{kernels}: {CASES} cases\n"), done.stderr


@all_kernels
def test_a_buffer_one_byte_too_short_is_found(driver, kernels):
    names = ["signs", *(f"{family}.{buffer}" for family, buffers in BUFFERS.items() for buffer in buffers)]
    for name in names:
        done = fuzz(driver, kernels, name)
        assert done.returncode not in (0, NOT_SUPPORTED), f"{name}: not found"
        # A vector that is only partly outside is an "unknown-crash" to some versions.
        assert re.search(r"AddressSanitizer: (heap-buffer-overflow|unknown-crash)", done.stderr), (name, done.stderr)
