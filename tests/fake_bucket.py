"""Buckets without DDP, and a transport that writes down what it is asked to move."""

import torch

from commq.collectives.memory import Memory


class FakeBucket:
    """The methods of GradBucket that a hook may use."""

    def __init__(self, index, parameters, last, buffer=None):
        self._index, self._parameters, self._last = index, parameters, last
        self._buffer = torch.cat([p.detach().flatten() for p in parameters]) if buffer is None else buffer

    def index(self):
        return self._index

    def parameters(self):
        return self._parameters

    def buffer(self):
        return self._buffer

    def is_last(self):
        return self._last


def exchange_all(state, buckets):
    """One step, each bucket before the next; then an empty log."""
    for bucket in buckets:
        state.exchange(bucket)
    state.transport.log.clear()
    state.transport.moves = 0


def buckets_of(*lists):
    return [FakeBucket(i, parameters, i == len(lists) - 1) for i, parameters in enumerate(lists)]


class Recorder:
    """Rank 0 of two. Moves bring nothing; `log` has each start, and each wait as "wait" and the move's number."""

    rank, world_size = 0, 2

    def __init__(self):
        self.memory, self.log, self.moves, self.fails = Memory(), [], 0, False

    def share(self, value):
        return [value] * self.world_size

    def all_to_all(self, send, recv):
        return self._start("all_to_all", recv, send)

    def all_gather(self, row, out):
        return self._start("all_gather", out, row)

    def _start(self, name, written, read):
        if self.fails:
            raise RuntimeError(f"{name} failed")
        written.zero_()
        self.memory.sent_bytes += read.numel() // 2 if name == "all_to_all" else read.numel()
        self.log.append(f"{name} {self.moves}")
        self.moves += 1
        return _Move(self, self.moves - 1)


class _Move:
    def __init__(self, recorder, number):
        self.recorder, self.number = recorder, number

    def wait(self):
        self.recorder.log.append(f"wait {self.number}")
