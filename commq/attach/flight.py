"""Flight: the buckets of one backward pass that are under way.

The hook of a bucket starts it and lets the buckets before it go on, so that the link has something to carry while
gradients are computed and codecs run; the last one waits for all. On CUDA everything is queued on one side stream and
the host goes on. What is queued, and in which order, depends on the order of the buckets alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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
        self._entered: torch.cuda.Event
        """Recorded anew each time: a wait is for the last record before it."""

    def on(self, device: torch.device, name: str) -> AbstractContextManager[None]:
        """Time what happens inside; on CUDA do it on the side stream, after what the current stream has queued.

        torch.profiler shows it as a range commq::<name>.
        """
        return self._shown_on(device, name) if profiler._is_profiler_enabled else self._on(device)

    def add(self, laid: Laid, route: Route, step: int, arrived: Callable[[], None]) -> None:
        """Start a bucket, and let those before it go on. `arrived` is called when its gradients are averaged."""
        left = len(laid.messages)

        def ended() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                laid.scatter()
                arrived()

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

    def end_step(self) -> None:
        """Forget what is under way, and time the next step if it is due."""
        self._exchange.abandon()
        self.clock.next_step()

    def abandon(self) -> None:
        """Forget what is under way, after an error."""
        self._exchange.abandon()

    @contextmanager
    def _shown_on(self, device: torch.device, name: str) -> Iterator[None]:
        with profiler.record_function(f"commq::{name}"), self._on(device):
            yield

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self.clock.add(time.perf_counter() - start)
            return
        if self._side is None:
            # Its kernels are short and the link waits for them: they go before those of backward.
            self._side, self._entered = torch.cuda.Stream(device, priority=-1), torch.cuda.Event()
        # By number, and without torch.cuda.stream: what looks devices up costs the host as much as a launch, each time.
        side, outside = self._side, torch.cuda.current_stream(self._side.device_index)
        self._entered.record(outside)
        side.wait_event(self._entered)
        torch.cuda.set_stream(side)
        try:
            timed = self.clock.begin(side)
            yield
            if timed is not None:
                self.clock.end(timed, side)
        finally:
            torch.cuda.set_stream(outside)
