"""`commq.functional`: differentiable exchanges. What they are and have in common: commq/collectives/functional.py."""

from commq.collectives.functional import (
    all_gather,
    all_reduce,
    all_to_all,
    recv,
    reduce_scatter,
    replicate,
    send,
    shard,
)
from commq.collectives.traffic import Traffic, traffic

__all__ = [
    "Traffic",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "recv",
    "reduce_scatter",
    "replicate",
    "send",
    "shard",
    "traffic",
]
