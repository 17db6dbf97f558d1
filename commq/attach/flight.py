"""Flight: the buckets of one backward pass that are under way.

The hook of a bucket starts it and lets the buckets before it go on, so that the link has something to carry while
gradients are computed and codecs run; the last one waits for all. On CUDA everything is queued on one side stream and
the host goes on. What is queued, and in which order, depends on the order of the buckets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import profiler

from commq.attach.bucket import Laid
from commq.attach.clock import Clock
from commq.collectives.route import Route
from commq.collectives.schedule import Exchange


class Flight:
    """Exchanges that go on while others start. Use it inside `on`."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._exchange = Exchange()
        self._side: torch.cuda.Stream | None = None

    @contextmanager
    def on(self, device: torch.device, name: str) -> Iterator[None]:
        """Time what happens inside; on CUDA do it on the side stream, after what the current stream has queued.

        torch.profiler shows it as a range commq::<name>.
        """
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"commq::{name}"), self._on(device):
                yield
        else:
            with self._on(device):
                yield

    def add(self, laid: Laid, route: Route, step: int, arrived: Callable[[], None]) -> None:
        """Start a bucket, and let those before it go on. `arrived` is called when its gradients are averaged."""
        left = len(laid.messages)

        def ended() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                laid.scatter()
                arrived()

        if self._side is not None:
            laid.buffer.record_stream(self._side)  # an error may free it before the side stream has passed it
        laid.gather(step)
        for message in laid.messages:
            self._exchange.add(route.build(message), ended)
        if not laid.messages:
            arrived()

    def land(self) -> None:
        """Wait for all that is under way (on CUDA the side stream does)."""
        self._exchange.finish()

    def join(self, device: torch.device) -> None:
        """On CUDA, make the current stream wait for what the side stream has queued."""
        if self._side is not None:
            torch.cuda.current_stream(device).wait_stream(self._side)

    def abandon(self) -> None:
        """Forget what is under way, after an error."""
        self._exchange.abandon()

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            with self.clock.running(device):
                yield
            return
        if self._side is None:
            # Its kernels are short and the link waits for them: they go before those of backward.
            self._side = torch.cuda.Stream(device, priority=-1)
        # By number, and without torch.cuda.stream: what looks devices up costs the host as much as a launch, each time.
        outside = torch.cuda.current_stream(self._side.device_index)
        self._side.wait_stream(outside)
        torch.cuda.set_stream(self._side)
        try:
            with self.clock.running(device):
                yield
        finally:
            torch.cuda.set_stream(outside)
