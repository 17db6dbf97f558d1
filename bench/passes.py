"""Forward and backward passes of W ranks that live in one process, one rank after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Passes:
    """On a GPU, one CUDA graph of all ranks' passes: launching them one by one would take longer than they do.

    find_gradients: from a rank and its tokens (int64, B x T) to its loss; it leaves the gradients where they are sent
    from. It is captured in the first call, so what it reads and writes must stay where it is.
    """

    def __init__(self, find_gradients: Callable[[int, Tensor], Tensor], device: torch.device) -> None:
        self._find_gradients, self._device = find_gradients, device
        self._run: Callable[[], None] | None = None

    def __call__(self, tokens_WBT: Tensor) -> Tensor:
        """The loss of each rank, in memory that the next call writes to."""
        if self._run is None:
            self._tokens_WBT = torch.empty_like(tokens_WBT, device=self._device)
            self._losses_W = torch.zeros(len(tokens_WBT), device=self._device)
            self._tokens_WBT.copy_(tokens_WBT)
            self._run = self._captured() if self._device.type == "cuda" else self._all
        self._tokens_WBT.copy_(tokens_WBT, non_blocking=True)
        self._run()
        return self._losses_W

    def forget(self) -> None:
        """The model computes something else from now on."""
        self._run = None

    def _all(self) -> None:
        for rank, tokens_BT in enumerate(self._tokens_WBT):
            self._losses_W[rank] = self._find_gradients(rank, tokens_BT)

    def _captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._all()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._all()
        return graph.replay
