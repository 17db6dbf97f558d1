"""What a step of an optimizer takes, and the bytes of its state: commq's low-bit AdamW against torch's.

    python bench/optimizers.py --model gpt2-medium                        # on a GPU
    python bench/optimizers.py --model tiny --device cpu --steps 3

The step includes the host: kernels are launched as training launches them. "memory" is what the allocator has more
after the first step than before it, over float32 AdamW's (GPU only); "state" is counted in the tensors. torchao's and
bitsandbytes' optimizers are there if they are installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from commq.optim import AdamW4bit, AdamW8bit, AdamWFp8  # noqa: E402
from commq.train.report import state_bytes  # noqa: E402
from gpt2 import GPT2, MODELS  # noqa: E402
from timing import environment  # noqa: E402

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def optimizers(device: str) -> dict[str, Make]:
    """The first is what the others are compared with."""
    found: dict[str, Make] = {
        "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "AdamW8bit": AdamW8bit,
        "AdamW4bit": AdamW4bit,
        "AdamWFp8": AdamWFp8,
        "AdamW8bit clipping": lambda p: AdamW8bit(p, update_clipping=True),
    }
    if importlib.util.find_spec("torchao") is not None:
        from torchao import optim as ao

        found |= {"torchao AdamW8bit": ao.AdamW8bit, "torchao AdamW4bit": ao.AdamW4bit}
    if importlib.util.find_spec("bitsandbytes") is not None and device == "cuda":
        from bitsandbytes import optim as bnb

        found["bitsandbytes AdamW8bit"] = bnb.AdamW8bit
    return found


def measure(name: str, make: Make, shapes: list[torch.Size], device: str, steps: int) -> dict[str, float | str]:
    """Median seconds of a step, bytes of the state by its tensors and by the allocator."""
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for p in parameters:
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer = make(parameters)
    gc.collect()
    before = _allocated(device)
    optimizer.step()
    allocated = _allocated(device) - before
    for _ in range(3):
        optimizer.step()
    seconds = []
    for _ in range(steps):
        _wait(device)
        start = time.perf_counter()
        optimizer.step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {"optimizer": name, "seconds": median, "state": state_bytes(optimizer), "allocated": allocated}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _allocated(device: str) -> int:
    _wait(device)
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=tuple(MODELS))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", help="append a JSON line for each optimizer")
    args = parser.parse_args()
    shapes = [p.shape for p in GPT2(MODELS[args.model]).parameters()]
    print(f"{args.model}: {sum(shape.numel() for shape in shapes) / 1e6:.1f} M parameters in {len(shapes)} tensors")
    print(f"{'optimizer':<24} {'ms a step':>10} {'state':>8} {'of fp32':>8} {'memory':>8}")
    base: dict[str, float | str] = {}
    for name, make in optimizers(args.device).items():
        row = measure(name, make, shapes, args.device, args.steps)
        base = base or row
        memory = f"{row['allocated'] / base['allocated']:8.3f}" if base["allocated"] else f"{'-':>8}"
        print(
            f"{name:<24} {row['seconds'] * 1e3:10.2f} {row['state'] / 1e6:6.1f}MB {row['state'] / base['state']:8.3f} "
            f"{memory}",
            flush=True,
        )
        if args.out:
            with Path(args.out).open("a") as stream:
                stream.write(json.dumps(row | {"model": args.model, "environment": environment(args.device)}) + "\n")


if __name__ == "__main__":
    main()
