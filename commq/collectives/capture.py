"""CUDA graphs: what cannot be captured is refused, since a replay would leave out what the host does.

A collective whose schedule is named can be captured, once an eager call has found out what there is to find out; the
replay gives the bits of the call. Its `step` and `seed` are captured, too: random bits repeat.
"""

from __future__ import annotations

import torch


def refuse_capture(what: str, instead: str, device: torch.device | None = None) -> None:
    """RuntimeError if the current stream (of `device`; None: of any) is being captured. Asks the host alone."""
    if device is not None and device.type != "cuda":
        return
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} cannot be captured in a CUDA graph: {instead}")
