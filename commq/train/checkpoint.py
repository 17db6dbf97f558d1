"""Checkpoints on disk, complete or absent.

    checkpoints/step-00000300/common.pt    what all ranks share: weights, optimizer, step, config
                              rank-0.pt    what rank 0 alone has: residuals, random state
                              rank-1.pt    ...

All files are tensors and plain data, loadable with `weights_only=True`. A checkpoint is written under a
hidden name, flushed to the disk and then renamed, so a crash at any moment leaves the older ones intact.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

State = dict[str, Any]


def save_checkpoint(folder: Path, step: int, common: State, own: State, *, keep: int) -> Path:
    """Write the checkpoint of `step`, then drop all but the newest `keep`. All ranks call it.

    `common` is written by rank 0, `own` by each rank. If there already is a checkpoint of that
    step, nothing is written.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}"
    rank = dist.get_rank()
    if final.exists():
        return final
    dist.barrier()  # nobody creates `final` before all have looked
    if rank == 0:
        _remove_leftovers(folder)
        partial.mkdir(parents=True)
        _write(partial / "common.pt", common)
    dist.barrier()
    _write(partial / f"rank-{rank}.pt", own)
    dist.barrier()
    if rank == 0:
        _flush(partial)
        partial.rename(final)
        _flush(folder)
        for old in _complete(folder)[:-keep]:
            old.rename(folder / f".{old.name}")
        _remove_leftovers(folder)
    dist.barrier()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the largest step, if there is any."""
    return max(_complete(folder), default=None)


def load_common(path: Path) -> State:
    """What all ranks share, on the CPU."""
    return _read(path / "common.pt")


def load_own(path: Path, rank: int) -> State:
    """What `rank` alone had, on the CPU."""
    return _read(path / f"rank-{rank}.pt")


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _remove_leftovers(folder: Path) -> None:
    for partial in folder.glob(".step-*"):
        shutil.rmtree(partial)


def _read(path: Path) -> State:
    return torch.load(path, map_location="cpu", weights_only=True)


def _write(path: Path, state: State) -> None:
    with open(path, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
