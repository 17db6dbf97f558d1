"""Triton kernels on CPU tensors, without an environment variable for the whole run."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


def interpreted(name: str) -> ModuleType:
    """A second copy of a Triton module, and of those it imports, made of interpreted kernels. name: in full."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install triton")
    importlib.import_module("triton.language")  # itself always compiled; only our kernels are interpreted

    def ours() -> list[str]:
        return [module for module in sys.modules if module == name or module.startswith("commq.codecs.triton_")]

    compiled = {module: sys.modules.pop(module) for module in ours()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        copy = importlib.import_module(name)
    for module in ours():
        del sys.modules[module]
    sys.modules.update(compiled)
    return copy


@contextmanager
def interpreting() -> Iterator[None]:
    """The Triton modules of commq are interpreted copies, and operators take them for CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install triton")
    importlib.import_module("triton.language")
    compiled = _take_out()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield
    _take_out()
    for name, module in compiled.items():
        folder, _, leaf = name.rpartition(".")
        sys.modules[name] = module
        setattr(sys.modules[folder], leaf, module)


def _take_out() -> dict[str, ModuleType]:
    """Triton modules, as if they had not been imported."""
    found = {}
    for name in list(sys.modules):
        if name.startswith(("commq.codecs.triton_", "commq.lowp.triton_")):
            folder, _, leaf = name.rpartition(".")
            found[name] = sys.modules.pop(name)
            vars(sys.modules[folder]).pop(leaf, None)
    return found
