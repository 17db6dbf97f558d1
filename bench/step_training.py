"""What bench/step.py times: steps of a GPT-2 whose gradients travel by a method."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from gpt2 import GPT2, GPT2Config, random_tokens
from step_methods import Attached, Method


class Training:
    """A model, an optimizer and a method."""

    def __init__(self, method: Method, config: GPT2Config, rows: int, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        with device:
            model = GPT2(config)
        self.attached: Attached = method.attach(model)
        self.optimizer = self.attached.optimizer or torch.optim.AdamW(
            self.attached.module.parameters(), lr=1e-4, fused=True
        )
        self.tokens = [random_tokens(config, rows, seed=4 * dist.get_rank() + i, device=device) for i in range(4)]
        self.steps = 0

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.attached.module(self.tokens[self.steps % len(self.tokens)])
        loss.backward()
        self.optimizer.step()
        self.steps += 1

    def profile(self, steps: int = 3) -> dict[str, Any]:
        """Of a step: allocations, memory newly taken from the device, and synchronisations of the host with it."""
        before = torch.cuda.memory_stats()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(steps):
                    self.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()
        syncs = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
        torch.cuda.synchronize()
        names = {
            "allocations": "allocation.all.allocated",
            "segments": "segment.all.allocated",
            "retries": "num_alloc_retries",
        }
        counts = {name: (after.get(key, 0) - before.get(key, 0)) / steps for name, key in names.items()}
        return {**counts, "synchronizations": len(syncs) / steps, "where": sorted(set(syncs))}
