"""Where a DDP hook spends the host's time: microseconds of each part for a bucket, and its calls to CUDA.

torch.profiler adds about a microsecond to every call that it sees, so the sum is more than `host us` of bench/step.py;
the numbers of calls are exact. What no part claims is Python: the hook's own code and what is around calls to torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

HOOK = "hook"
"""The range that bench/step_methods.py puts around every hook."""
PARTS = {
    "encode": ("commq::encode_bucket",),
    "sum": ("commq::decode_sum",),
    "decode": ("commq::decode_bucket",),
    "moves": ("c10d::", "nccl:", "gloo:"),
    "copies": ("aten::_foreach", "aten::copy_", "aten::index", "aten::zero_", "aten::fill_", "aten::to"),
    "views": ("aten::narrow", "aten::slice", "aten::select", "aten::view", "aten::split", "aten::as_strided"),
    "memory": ("aten::empty", "aten::new_empty", "aten::resize", "aten::record_stream"),
    "streams": ("cudaEvent", "cudaStream"),
}
"""Parts by the beginnings of their events' names; an event within one of these belongs to it."""


def host_parts(step: Callable[[], Any], steps: int = 3) -> dict[str, dict[str, float]]:
    """Of the hooks in a few steps, for a bucket: "us" of each part, and "calls" to CUDA and of torch's operators."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and (part := _part(event)):
            times[part] += event.self_cpu_time_total
            calls[event.name] += 1
    hooks = calls.pop(HOOK, 0)
    if not hooks:
        return {"us": {}, "calls": {}}
    return {
        "us": {part: time / hooks for part, time in times.most_common()},
        "calls": {n: count / hooks for n, count in calls.most_common() if n.startswith(("cuda", "cu", "aten", "c10d"))},
    }


def _part(event: Any) -> str | None:
    """The part that an event belongs to; None: it is in no hook."""
    found = None
    while event is not None and event.name != HOOK:
        found = next((part for part, names in PARTS.items() if event.name.startswith(names)), found)
        event = event.cpu_parent
    return None if event is None else found or "python"


def text(parts: dict[str, dict[str, float]]) -> str:
    """Two lines."""
    us = ", ".join(f"{part} {time:.0f}" for part, time in parts["us"].items())
    calls = ", ".join(f"{name} {count:.1f}" for name, count in parts["calls"].items())
    return f"          profiled us a bucket: {us or 'no hook'}\n          calls a bucket: {calls}"
