"""torch.distributed.checkpoint: a handle's state in a checkpoint of several ranks, and back at any world size.

DCP takes tensors of one name on several ranks for copies of each other. Residuals are not, so every rank's state goes
in as bytes under a name of its own, and needs no planner.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from commq.feedback.state import fold

_KEY = "commq.rank{}"


def pack_state(state: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """What to pass to `dcp.save` beside the model's state: one uint8 tensor."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return {_KEY.format(rank): torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)}


def read_state(path: str | Path, rank: int, world_size: int) -> dict[str, Any]:
    """The state of `rank` among `world_size` from a checkpoint of any number of ranks, which `fold` puts together.

    Reads only the states that this rank takes over. ValueError if the checkpoint has none.
    """
    saved = count_states(path)
    states = read_states(path, range(saved)[rank::world_size] or [0])
    residuals = [state["residual"] for state in states]
    # A rank that the saved job did not have starts from zero.
    folded = fold(residuals, 1)[0] if rank < saved else fold(residuals, 2)[1]
    return {**states[0], "residual": folded}


def count_states(path: str | Path) -> int:
    """How many ranks' states a checkpoint has. ValueError if it does not have those of ranks 0, 1, 2, ..."""
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    saved = sorted(int(match[1]) for key in found if (match := re.fullmatch(_KEY.format(r"(\d+)"), key)))
    if not saved or saved != list(range(len(saved))):
        raise ValueError(
            f"{path} has states of ranks {saved}, expected those of all ranks; save it with "
            "dcp.save({..., **handle.dcp_state()}) on every rank"
        )
    return len(saved)


def read_states(path: str | Path, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """The states of some of the ranks that saved a checkpoint, on the CPU."""
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    blobs = {}
    for key in map(_KEY.format, ranks):
        entry = found[key]
        assert isinstance(entry, TensorStorageMetadata)
        blobs[key] = torch.empty(entry.size, dtype=torch.uint8)
    load(blobs, checkpoint_id=path, no_dist=True)
    return [
        torch.load(io.BytesIO(blob.numpy().tobytes()), map_location="cpu", weights_only=True) for blob in blobs.values()
    ]
