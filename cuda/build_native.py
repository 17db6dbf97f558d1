"""How commq/_native.so is built: the CPU twin always, the CUDA kernels where there is an nvcc.

The library uses LibTorch's stable ABI, so one file works with torch 2.10 and later, CPU or CUDA builds, any Python.
Headers come from the torch that is installed; nothing is downloaded. Objects are kept in build/native and compiled
again when a file they include, or the command, has changed. `CXX`, `CUDA_HOME` and `COMMQ_CUDA_ARCHS` (such as
"80;90") are honoured. Without a compiler, or without torch in sight, the library is left out and commq still installs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "cuda"
OBJECTS = ROOT / "build" / "native"
ARCHS = "80;90;100"
TORCH_TARGET = "0x020a000000000000"
"""The oldest torch whose stable ABI is used: 2.10."""

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def native_extension() -> Extension:
    sources = [str(p.relative_to(ROOT)) for p in sorted(SOURCES.glob("*.c*")) if p.suffix in (".cpp", ".cu")]
    headers = [str(p.relative_to(ROOT)) for p in sorted(SOURCES.glob("*")) if p.suffix in (".h", ".cuh", ".py")]
    return Extension("commq._native", sources, depends=headers)


class NativeBuild(build_ext):
    """build_ext for the one extension above."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI tag: the library does not use Python's

    def build_extension(self, ext: Extension) -> None:
        torch, cxx, nvcc = _torch(), _compiler(), _nvcc()
        missing = "torch" if torch is None else "a C++ compiler" if cxx is None else ""
        if missing:
            advice = "; install with --no-build-isolation" if torch is None else ""
            print(f"commq: no native library, {missing} was not found{advice}")
            return
        library = Path(self.get_ext_fullpath(ext.name))
        _build(library, [Path(s) for s in ext.sources], torch, cxx, nvcc)

    def copy_extensions_to_source(self) -> None:
        if (Path(self.build_lib) / self.get_ext_filename("commq._native")).exists():
            super().copy_extensions_to_source()


def _torch() -> Path | None:
    """The installed torch's folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def _archs() -> list[str]:
    return [arch for arch in os.environ.get("COMMQ_CUDA_ARCHS", ARCHS).replace(",", ";").split(";") if arch]


def _built_from(torch: Path, nvcc: str | None) -> str:
    version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    parts = [f"torch {version[1] if version else 'unknown'}"]
    if nvcc is None:
        return "; ".join([*parts, "CPU only"])
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return "; ".join([*parts, f"CUDA {release[1] if release else 'unknown'}: SM {' '.join(_archs())} and PTX"])


def _build(library: Path, sources: list[Path], torch: Path, cxx: str, nvcc: str | None) -> None:
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(["-DUSE_CUDA"] if nvcc else [])]
    built_from = f'-DCOMMQ_BUILT_FROM="{_built_from(torch, nvcc)}"'
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _archs()]
    gencode.append(f"-gencode=arch=compute_{_archs()[-1]},code=compute_{_archs()[-1]}")
    commands = []
    # The longest first, so that the last core to finish does so early.
    for source in sorted(sources, key=lambda s: (s.suffix != ".cu", s.name)):
        out = OBJECTS / f"{source.name}.o"
        if source.suffix == ".cpp":
            flags = [*CXX_FLAGS, *defines, *includes, *([built_from] if source.name == "ops.cpp" else [])]
            commands.append([*cxx.split(), *flags, "-MD", "-MF", f"{out}.d", "-c", str(source), "-o", str(out)])
        elif nvcc:
            command = [nvcc, *NVCC_FLAGS, *gencode, "-MD", "-MF", f"{out}.d", "-c", str(source), "-o", str(out)]
            commands.append(command)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    stale = [command for command in commands if _is_stale(command)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_compile, stale))
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = [command[-1] for command in commands]
    # The device link is not needed (no relocatable device code); the CUDA runtime is linked statically.
    runtime = Path(nvcc).resolve() if nvcc else None
    cuda = [f"-L{_cuda_libraries(runtime)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"] if runtime else []
    partial = library.with_suffix(".so.partial")
    torch_libs = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    _run([*cxx.split(), "-shared", "-o", str(partial), *objects, *cuda, *torch_libs])
    partial.replace(library)  # processes that have the old library loaded keep it


def _cuda_libraries(nvcc: Path) -> Path:
    """The folder with libcudart_static.a, asked of nvcc itself: nvcc may be a wrapper elsewhere."""
    plan = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    for folder in re.findall(r'-L"?([^"\s]+)"?', plan.stderr):
        if (Path(folder) / "libcudart_static.a").exists():
            return Path(folder)
    raise FileNotFoundError(f"libcudart_static.a was not found beside {nvcc}; set CUDA_HOME to a whole CUDA toolkit")


def _is_stale(command: list[str]) -> bool:
    """Whether the object is missing, was made by another command, or is older than a file it includes."""
    out = Path(command[-1])
    record, depends = out.with_suffix(".o.cmd"), Path(f"{out}.d")
    if not (out.exists() and depends.exists() and record.exists() and record.read_text() == shlex.join(command)):
        return True
    files = shlex.split(depends.read_text().replace("\\\n", " ").split(":", 1)[1])
    built = out.stat().st_mtime
    return any(not os.path.exists(f) or os.stat(f).st_mtime > built for f in files)


def _compile(command: list[str]) -> None:
    _run(command)
    out = Path(command[-1])
    out.with_suffix(".o.cmd").write_text(shlex.join(command))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
