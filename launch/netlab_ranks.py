"""The processes of one command in a lab: started inside their hosts, heard, and ended together."""

import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import IO

from netlab_links import Network


@dataclass(frozen=True)
class Task:
    name: str
    host: int
    command: list[str]
    environment: dict[str, str]


class Job:
    """One process per task, numbered in order. If there are several, what they print begins with [number].

    quiet_others: pass on the output of process 0 only; of another that fails, the last lines.
    """

    def __init__(self, network: Network, tasks: list[Task], quiet_others: bool = False) -> None:
        self.network = network
        self.tasks = tasks
        self.quiet_others = quiet_others
        self.failed: int | None = None
        self.exit_code = 0
        self._running = len(tasks)
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._tails: list[deque[str]] = [deque(maxlen=30) for _ in tasks]
        self._relays: list[threading.Thread] = []
        for number, task in enumerate(tasks):
            self._start(number, task)

    def _start(self, number: int, task: Task) -> None:
        output = subprocess.PIPE if len(self.tasks) > 1 else None
        with self.network.inside(self.network.host(task.host)):
            process = subprocess.Popen(
                task.command,
                env=task.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that Ctrl-C reaches the lab alone
            )
        threading.Thread(target=lambda: self._ended.put((number, process.wait())), daemon=True).start()
        if process.stdout and process.stderr:
            for pipe, sink in (process.stdout, sys.stdout), (process.stderr, sys.stderr):
                relay = threading.Thread(target=self._relay, args=(number, pipe, sink), daemon=True)
                relay.start()
                self._relays.append(relay)

    def _relay(self, number: int, pipe: IO[bytes], sink: IO[str]) -> None:
        with pipe:
            for line in pipe:
                text = f"[{number}] " + line.decode(errors="replace")
                if self.quiet_others and number:
                    self._tails[number].append(text)
                    continue
                try:
                    sink.write(text)
                    sink.flush()
                except BrokenPipeError:
                    return  # closes the pipe, so the process learns that nobody reads

    def wait(self, timeout: float | None = None) -> int:
        """0, or the exit code of the first process that failed (128 + n for signal n), which ends the others.

        Raises TimeoutError, and leaves all running, if that takes longer than `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                number, code = self._ended.get(timeout=left)
            except queue.Empty:
                raise TimeoutError(f"{self._running} processes still run after {timeout} s") from None
            self._running -= 1
            if code and self.failed is None:
                self._fail(number, code)
        self.network.kill(hosts_only=True)  # what the processes left in the background
        for relay in self._relays:
            relay.join()
        if self.failed is not None:
            sys.stderr.writelines(self._tails[self.failed])
        return self.exit_code

    def _fail(self, number: int, code: int) -> None:
        self.failed = number
        self.exit_code = code if code > 0 else 128 - code
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        others = f"; ending the other {self._running}" if self._running else ""
        print(f"netlab: {self.tasks[number].name} failed with {how}{others}", file=sys.stderr, flush=True)
        self.network.kill(hosts_only=True)
