"""Stopping in an orderly way: all ranks at the same step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class Stop:
    """While entered, SIGINT and SIGTERM ask for a stop at the next step; a second one kills at once.

    A process that torchrun started also asks for a stop when torchrun itself has died.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Stop:
        self._requested = False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._previous = [signal.signal(number, self._request) for number in self._SIGNALS]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in zip(self._SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Whether any rank asks for a stop; the same answer on every rank, which all must call."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        wish = torch.tensor(int(self._requested or orphaned))
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        return bool(wish)
