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
    with interpreting():
        return importlib.import_module(name)


@contextmanager
def interpreting() -> Iterator[None]:
    """The Triton modules of commq are interpreted copies, and operators take them for CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install triton")
    importlib.import_module("triton.language")  # itself always compiled; only our kernels are interpreted
    compiled = _take_out()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            yield
    finally:
        _take_out()
        for name, module in compiled.items():
            folder, _, leaf = name.rpartition(".")
            sys.modules[name] = module
            setattr(sys.modules[folder], leaf, module)


def _take_out() -> dict[str, ModuleType]:
    """Triton modules, as if they had not been imported."""
    found = {}
    for name in list(sys.modules):
        folder, _, leaf = name.rpartition(".")
        if folder.startswith("commq.") and leaf.startswith("triton_"):
            found[name] = sys.modules.pop(name)
            vars(sys.modules[folder]).pop(leaf, None)
    return found
