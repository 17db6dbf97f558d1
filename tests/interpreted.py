"""Triton kernels on CPU tensors, without an environment variable for the whole run."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def interpreted(name: str) -> ModuleType:
    """A second copy of commq.codecs.NAME, a Triton module, and of those it imports, made of interpreted kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install triton")
    importlib.import_module("triton.language")  # itself always compiled; only our kernels are interpreted

    def ours() -> list[str]:
        return [name for name in sys.modules if name.startswith("commq.codecs.triton_")]

    compiled = {name: sys.modules.pop(name) for name in ours()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module(f"commq.codecs.{name}")
    for name in ours():
        del sys.modules[name]
    sys.modules.update(compiled)
    return module
