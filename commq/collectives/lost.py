"""Which rank has died: the survivors of a failed move sign a list in the group's store; who is missing is named."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(seconds=5)
"""How long a rank that saw a move fail waits for the others to see it, too."""


class RankLostError(RuntimeError):
    """A collective failed because ranks are gone. `ranks`: those in the group that did not sign, maybe several."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


def name_lost_ranks(group: dist.ProcessGroup, operation: str, error: RuntimeError) -> RuntimeError:
    """What to raise in place of a transport's `error`, which seldom says which rank is at fault.

    Takes up to PATIENCE. A RankLostError if some ranks did not report in that time, else an error that says that
    all ranks are alive. NCCL reports a lost rank by ending the process (its watchdog), so this is for gloo.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    keys = [f"commq/failed/{member}" for member in range(world_size)]
    where = f"rank {rank} of {world_size}: {operation} failed"
    try:
        store = group.get_group_store()
        store.set(keys[rank], operation)
        missing = _unsigned(store, keys)
    except Exception as lost_store:
        first = str(lost_store).splitlines()[0] if str(lost_store) else type(lost_store).__name__
        return RankLostError(
            f"{where}, and the store that holds the job together does not answer ({first}): the process that holds "
            f"it, rank 0 unless a launcher does, is probably gone. The transport said: {error}",
            (),
        )
    if not missing:
        return RuntimeError(f"{where}, though all ranks are alive. The transport said: {error}")
    names = ", ".join(map(str, missing))
    gone = f"rank {names} has" if len(missing) == 1 else f"ranks {names} have"
    return RankLostError(
        f"{where}: {gone} not been heard of for {PATIENCE.seconds} s since. Look at the output of "
        f"{'that rank' if len(missing) == 1 else 'those ranks'} and restart the job from its last checkpoint. "
        f"The transport said: {error}",
        missing,
    )


def _unsigned(store: Any, keys: list[str]) -> tuple[int, ...]:
    try:
        store.wait(keys, PATIENCE)
        return ()
    except (RuntimeError, dist.DistStoreError):
        return tuple(member for member, key in enumerate(keys) if not store.check([key]))
