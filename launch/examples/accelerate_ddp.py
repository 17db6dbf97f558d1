"""Hugging Face Accelerate: one line after `prepare`.

torchrun --nproc-per-node 2 launch/examples/accelerate_ddp.py
accelerate launch --cpu --num_processes 2 launch/examples/accelerate_ddp.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commq


def train(recipe: str = "int4", epochs: int = 2) -> tuple[nn.Module, commq.HookState, list[float]]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    x = torch.randn(128, 64)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(TensorDataset(x, x.sin()), batch_size=8)
    )
    handle = commq.register(model, recipe, grad_scaler=accelerator.scaler)  # `prepare` made it a DDP module
    losses = []
    for _ in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = (model(inputs) - targets).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}, bytes sent: {handle.stats().ratio:.3f} of fp32's")
    return model, handle, losses


if __name__ == "__main__":
    train()
