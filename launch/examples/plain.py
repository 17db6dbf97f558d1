"""Plain PyTorch: DistributedDataParallel with commq, and a checkpoint that any number of ranks can go on from.

torchrun --nproc-per-node 4 launch/examples/plain.py --folder out/plain
torchrun --nproc-per-node 2 launch/examples/plain.py --folder out/plain     # goes on, with half the ranks
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commq


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def batch(step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of 48 examples: the same ones whatever the world size."""
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(step))
    return x[rank::world_size], x.sin()[rank::world_size]


def train(folder: Path, steps: int = 10, recipe: str = "int4") -> list[float]:
    """Train `steps` more steps and save. The mean loss of each."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    ddp = DistributedDataParallel(model)
    handle = commq.register(ddp, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    first = 0
    if folder.exists():
        state = {"model": model.state_dict(), "step": 0}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        handle.load_dcp(folder)  # residuals: the number of ranks may be another one
        first = state["step"]
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step, rank, world_size)
        optimizer.zero_grad()
        loss = (ddp(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world_size)
    state = {"model": model.state_dict(), "step": first + steps, **handle.dcp_state()}
    dist.barrier()
    dcp.save(state, checkpoint_id=folder)
    if rank == 0:
        print(f"steps {first} to {first + steps - 1}, {world_size} ranks: loss {losses[0]:.4f} to {losses[-1]:.4f}")
        print(f"bytes sent: {handle.stats().ratio:.3f} of fp32 gradients")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/plain"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipe", default="int4")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    train(options.folder, options.steps, options.recipe)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
