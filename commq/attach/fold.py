"""State at another number of ranks: of residuals, and of sharded training."""

from __future__ import annotations

from typing import Any

from commq.attach.fsdp_state import fold_shards
from commq.feedback import state


def fold(states: list[dict[str, Any]], world_size: int, *, replicas: int = 1) -> list[dict[str, Any]]:
    """The state of every new rank from that of every old one, both in rank order.

    states: on the CPU, the "residual" of what handles of `commq.register` and of optimizers saved, or all that those of
    `commq.fully_shard` did. replicas: of sharded training on a mesh (replicas, world_size), in whose order its states
    come back. The sum of residuals over ranks is kept: see feedback/state.py and attach/fsdp_state.py. At the same size
    the states come back unchanged, to the bit.
    """
    if "units" in states[0]:
        return fold_shards(states, world_size, replicas)
    if replicas != 1:
        raise ValueError(f"fold: replicas={replicas} for states that are not of sharded training, expected 1")
    return state.fold(states, world_size)
