"""Work: a collective under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.futures import Future

from commq.collectives.schedule import Exchange, Schedule
from commq.collectives.transport import Transport


class Work:
    """Handle of an asynchronous collective: `wait()` before the tensors are used, as with torch.distributed.

    On CUDA everything is queued on a side stream at once, the host goes on, and `wait` makes the current stream wait.
    On the CPU the first moves travel in the background, and `wait` does the rest, so all ranks must wait for their
    collectives in the same order.
    """

    def __init__(
        self,
        exchange: Exchange,
        outputs: list[Tensor],
        transport: Transport,
        *,
        touched: Iterable[Tensor] = (),
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._exchange: Exchange | None = exchange
        self._finish = finish
        self._outputs = outputs
        self._event: torch.cuda.Event | None = None
        self._future: Future[list[Tensor]] | None = None
        device = outputs[0].device if outputs else torch.device("cpu")
        if device.type != "cuda":
            exchange.start()
            return
        side = transport.memory.side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        for tensor in (*outputs, *touched):
            tensor.record_stream(side)  # its memory is not given away before the side stream has passed
        self._future = Future(devices=[device])
        with torch.cuda.stream(side):
            self._run()
            self._event = side.record_event()
            self._future.set_result(outputs)

    def wait(self) -> bool:
        """Return when the outputs may be used (CUDA: by the current stream). True, as torch's Work."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._outputs[0].device))
        self._run()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return at once. On the CPU, where `wait` does the work: whether it has."""
        return self._exchange is None if self._event is None else self._event.query()

    def get_future(self) -> Future[list[Tensor]]:
        """A future of the list of outputs. On the CPU its `wait` is this `wait`."""
        if self._future is None:
            self._future = _Lazy(self)
            if self._exchange is None:
                self._future.set_result(self._outputs)
        return self._future

    def _run(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        exchange.finish()
        if self._finish is not None:
            self._finish()
        if self._event is None and isinstance(self._future, _Lazy):
            self._future.set_result(self._outputs)


class _Lazy(Future[list[Tensor]]):
    """A future that nobody else fulfils: whoever waits for it does the work."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def wait(self) -> list[Tensor]:
        self._work.wait()
        return super().wait()


def launch(
    schedules: Iterable[Schedule],
    outputs: Sequence[Tensor],
    transport: Transport,
    *,
    async_op: bool,
    touched: Iterable[Tensor] = (),
    finish: Callable[[], None] | None = None,
) -> Work | None:
    """Run schedules, and then `finish`; in the background if `async_op`.

    outputs: the caller's tensors that will hold the result. touched: others that are read or written meanwhile.
    """
    exchange = Exchange(schedules)
    if async_op:
        return Work(exchange, list(outputs), transport, touched=touched, finish=finish)
    exchange.finish()
    if finish is not None:
        finish()
    return None
