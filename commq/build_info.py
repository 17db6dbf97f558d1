"""What this installation of commq can run."""

from __future__ import annotations

import ctypes
import importlib.util

import torch

from commq.codecs import native


def build_info() -> str:
    """One line each: torch, the native library (what it was built from, or why it is not there), Triton."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    lines = [f"torch {torch.__version__} ({cuda})"]
    reason = native.missing(torch.device("cpu"))
    if reason:
        lines.append(f"native library: not available: {reason}")
    else:
        built_from = ctypes.CDLL(str(native.LIBRARY)).commq_built_from
        built_from.restype = ctypes.c_char_p
        lines.append(f"native library: built from {built_from().decode()}")
    triton = importlib.util.find_spec("triton") is not None
    lines.append(f"triton: {'available' if triton else 'not installed'}")
    return "\n".join(lines)
