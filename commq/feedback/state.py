"""Residuals at another world size.

Rule: the sum over ranks is kept. New rank r takes the sum of the residuals of the old ranks j with
j mod world_size == r; when the job grows, the new ranks start from zero. Exact for fp32 storage up to the rounding
of that sum, and up to one rounding of the storage otherwise. Residuals of the second hop ("answer") have one owner
for each element: new rank r takes the runs of the same old ranks, and the new owners get them from there.
"""

from __future__ import annotations

from typing import Any

import torch

from commq.codecs.reference import load_residual, store_residual


def fold(states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Residual state of every new rank from that of every old one (both in rank order).

    At the same world size the states come back unchanged, to the bit.
    """
    if len(states) == world_size:
        return states
    return [_add(states[rank::world_size], like=states[0]) for rank in range(world_size)]


def _add(states: list[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    block = like["block"]
    values, scales = {}, {}
    for name, first in like["values"].items():
        total = torch.zeros(first.numel())
        for state in states:
            total += load_residual(state["values"][name], state["scales"].get(name), block)
        values[name] = torch.zeros_like(first)
        if name in like["scales"]:
            scales[name] = torch.zeros_like(like["scales"][name])
        store_residual(total, total.isfinite(), values[name], scales.get(name), block)
    folded = {**like, "values": values, "scales": scales}
    if "answer" in like:
        runs: dict[str, list[Any]] = {}
        for state in states:
            for name, theirs in state["answer"]["runs"].items():
                runs.setdefault(name, []).extend(theirs)
        folded["answer"] = {**like["answer"], "runs": runs}
    return folded
