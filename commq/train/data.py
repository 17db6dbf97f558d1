"""Bytes as tokens: what is read, how it is split, and which bytes a step gets.

The last tenth of the bytes is held out for validation. A folder's files are ordered by a digest of their
relative paths, so that the held-out part is a fair sample and the order is the same on every machine.
A batch is a pure function of (seed, step, micro-batch, rank): the position in the data is the step.
"""

import hashlib
import os
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VAL_FRACTION = 0.1
_NOT_SOURCE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """What a run trains on.

    train, val: uint8, 1-D, the first nine tenths and the last tenth of the bytes.
    name: where the bytes come from, for people.
    digest: 16 hexadecimal digits that change with any byte.
    """

    train: Tensor
    val: Tensor
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}: {len(self.train) / 1e6:.2f} MB to train on, {len(self.val) / 1e6:.2f} MB held out"


def load_corpus(path: Path | None, *, max_mb: float, context: int) -> Corpus:
    """Read a file, all files below a folder (hidden ones excepted), or by default the Python source of the
    standard library without its tests and installed packages; at most `max_mb` * 10**6 bytes.

    ValueError: nothing there, nothing in it, or either part shorter than one sequence of `context` + 1.
    """
    name, content = _read(path, int(max_mb * 1e6))
    train_size = len(content) - int(len(content) * VAL_FRACTION)
    needed = context + 1
    if len(content) - train_size < needed:
        raise ValueError(
            f"{name} has {len(content)} bytes, of which the last tenth is held out for validation; "
            f"at least {10 * needed} are needed for context={context}: give more data or lower --context"
        )
    tokens = torch.frombuffer(content, dtype=torch.uint8)
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return Corpus(tokens[:train_size], tokens[train_size:], name, digest)


def train_batch(tokens: Tensor, *, seed: int, step: int, micro: int, rank: int, rows: int, context: int) -> Tensor:
    """Sequences at pseudo-random places, drawn with replacement: int64 (rows, context + 1)."""
    places = len(tokens) - context
    keys = (struct.pack("<5q", seed, step, micro, rank, row) for row in range(rows))
    starts = [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % places for key in keys]
    return _sequences(tokens, starts, context)


def val_batches(tokens: Tensor, *, count: int, rank: int, world_size: int, rows: int, context: int) -> Iterator[Tensor]:
    """This rank's share of `count` sequences spread evenly over `tokens`: int64 (<= rows, context + 1)."""
    last = len(tokens) - context - 1
    starts = [index * last // max(1, count - 1) for index in range(rank, count, world_size)]
    for first in range(0, len(starts), rows):
        yield _sequences(tokens, starts[first : first + rows], context)


def _sequences(tokens: Tensor, starts: list[int], context: int) -> Tensor:
    return torch.stack([tokens[start : start + context + 1] for start in starts]).long()


def _read(path: Path | None, limit: int) -> tuple[str, bytearray]:
    if path is None:
        root, name = Path(sysconfig.get_path("stdlib")), "Python's standard library"
        files = [file for file in _walk(root, _NOT_SOURCE) if file.suffix == ".py"]
    elif path.is_dir():
        root, name = path, str(path)
        files = list(_walk(root, frozenset()))
    elif path.is_file():
        root, name, files = path.parent, str(path), [path]
    else:
        raise ValueError(f"--data {path}: no such file or folder; give the path of a text or a folder of texts")

    def order(file: Path) -> bytes:
        return hashlib.blake2b(file.relative_to(root).as_posix().encode(), digest_size=8).digest()

    content = bytearray()
    for file in sorted(files, key=order):
        with open(file, "rb") as stream:
            content += stream.read(limit - len(content))
        if len(content) == limit:
            break
    if not content:
        raise ValueError(f"{name} is empty ({len(files)} files, 0 bytes); give a file or folder with some text")
    return name, content


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    """All files below `root`; nothing hidden, nothing in folders with a name in `skipped`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skipped]
        yield from (file for name in names if not name.startswith(".") and (file := Path(folder, name)).is_file())
