"""How long a call takes: on a GPU from CUDA graphs over rotating buffers, on a CPU by the clock.

A call is measured on several sets of buffers in turn, together larger than the last-level cache, so that nothing is
read from it that a training step would have to fetch from memory. On a GPU the calls are captured in a graph where
they can be, which leaves out the host; `host_cost` measures that alone.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
Build = Callable[[], Call]
"""Allocates one set of buffers and returns the call that works on them."""

_CACHE = 256 << 20
"""Bytes that no cache holds: five times an H100's L2."""
_ROW = 4 << 30
"""Bytes that a GPU needs more than a millisecond to move."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of several runs, and the fastest and slowest of them."""

    median: float
    fastest: float
    slowest: float

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        return Timing(statistics.median(seconds), min(seconds), max(seconds))


def time_calls(build: Build, nbytes: int, device: str, *, runs: int = 12, graph: bool = True) -> Timing:
    """Time the call that `build` makes. nbytes: what it reads and writes. graph: it may be captured."""
    sets = max(1, min(-(-_CACHE // max(nbytes, 1)), 64))
    calls = [build() for _ in range(sets)]
    for call in calls:  # compiles, fills caches of kernels and of the allocator, touches every page
        call()
    if device == "cpu":
        return _time_on_cpu(calls, runs)
    torch.cuda.synchronize()
    # Enough calls in a row that starting them does not count.
    rounds = max(1, min(_ROW // (sets * max(nbytes, 1)), 512 // sets))
    row = calls * rounds
    replay = _captured(row) if graph else lambda: [call() for call in row]
    replay()
    seconds = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / len(row))
    return Timing.of(seconds)


def _captured(calls: list[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _time_on_cpu(calls: list[Call], runs: int) -> Timing:
    seconds = []
    for run in range(runs):
        start = time.perf_counter()
        calls[run % len(calls)]()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def host_cost(call: Call, device: str, *, calls: int = 200, runs: int = 7) -> Timing:
    """Seconds the host spends in one call, with the device kept from falling behind."""
    seconds = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    _wait(device)
    return Timing.of(seconds[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, str | int]:
    """Where and with what a result was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    found: dict[str, str | int] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "changed since": _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "command": " ".join(sys.argv),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda or "none"
        found["driver and clocks"] = _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
        )
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
