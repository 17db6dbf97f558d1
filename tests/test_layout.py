"""The rules of the source tree: what may import what, how long a file may be, what `import commq` brings along."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The path of a tensor: each part of commq/ may import those before it. "commq" is commq/__init__.py itself, the
# public names.
PARTS = (
    "codecs",
    "build_info",
    "feedback",
    "stats",
    "collectives",
    "functional",
    "policy",
    "recipe",
    "recipes",
    "attach",
    "optim",
    "lowp",
    "commq",
    "train",
)
FOLDERS = ("bench", "commq", "cuda", "launch", "tests")
SUFFIXES = {".c", ".cpp", ".cu", ".cuh", ".h", ".py", ".sh"}

MODULES = sorted((ROOT / "commq").rglob("*.py"))
SOURCES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))]
SOURCES = [path for path in SOURCES if path.suffix in SUFFIXES]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(module: list[str]) -> str:
    """The part that a dotted name such as commq.codecs.wire belongs to."""
    return module[1] if len(module) > 1 and module[1] in PARTS else "commq"


def parts_imported(source: str, package: list[str]) -> set[str]:
    """The parts of commq that a module of `package` imports when it runs."""
    found = set()
    for node in running_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) + 1 - node.level] if node.level else []
            origin = origin + (node.module.split(".") if node.module else [])
            names = [[*origin, alias.name] for alias in node.names]
        else:
            continue
        found |= {part_of(name) for name in names if name[0] == "commq"}
    return found


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but for what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for branch in child.orelse:
                yield branch
                yield from running_nodes(branch)
        else:
            yield child
            yield from running_nodes(child)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_part_imports_only_parts_before_it(path):
    module = list(path.relative_to(ROOT).with_suffix("").parts)
    package = module[:-1]
    own = module[1] if module[1] != "__init__" else "commq"
    assert own in PARTS, f"{relative(path)} is in no part; add it to PARTS where it belongs"
    later = parts_imported(path.read_text(), package) - set(PARTS[: PARTS.index(own) + 1])
    assert not later, f"{relative(path)} imports {sorted(later)}, which comes after {own}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import commq", {"commq"}),
        ("import commq.collectives.plan as plan", {"collectives"}),
        ("from commq import encode", {"commq"}),
        ("from commq import codecs", {"codecs"}),
        ("from commq.feedback.residual import Residual", {"feedback"}),
        ("from . import wire", {"codecs"}),
        ("from .wire import size", {"codecs"}),
        ("from .. import stats", {"stats"}),
        ("from ..feedback import residual", {"feedback"}),
        ("def f():\n    from ..train import loop", {"train"}),
        ("import torch\nfrom commquick import train", set()),
        ("if TYPE_CHECKING:\n    from ..train import loop\nelse:\n    from ..attach import ddp", {"attach"}),
        ("if typing.TYPE_CHECKING:\n    from ..train import loop", set()),
    ],
)
def test_imports_are_found(source, expected):
    assert parts_imported(source, ["commq", "codecs"]) == expected


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_is_short_and_named_for_what_it_holds(path):
    lines = len(path.read_text().splitlines())
    assert lines < 400, f"{relative(path)} has {lines} lines; split it by noun"
    assert path.stem not in {"utils", "helpers"}, f"{relative(path)}: a helper lives with its noun"


def test_import_is_only_an_import(tmp_path):
    """No optional package, no CUDA, no handler for logging."""
    check = """
import logging, sys
import commq, torch
optional = {"matplotlib", "mpi4py", "rich", "tensorboard", "triton", "tyro"} & set(sys.modules)
assert not optional, f"import commq also imports {sorted(optional)}"
assert not torch.cuda.is_initialized(), "import commq starts CUDA"
assert not logging.root.handlers, "import commq sets up logging"
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
