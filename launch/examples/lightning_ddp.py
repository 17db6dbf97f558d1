"""Lightning: commq's hook in the arguments of DDPStrategy.

python launch/examples/lightning_ddp.py
"""

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commq


class Sine(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = (self.layers(x) - y).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class EveryDevice(DDPStrategy):
    """Lightning leaves hooks out on the CPU; on CUDA plain DDPStrategy will do."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.root_device.type != "cuda":
            self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)


def train(recipe: str = "int4", epochs: int = 2) -> tuple[Sine, commq.HookState]:
    """The group must be there before the hook's state; Lightning takes it as it is."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    lightning.seed_everything(0, verbose=False)
    handle = commq.HookState(recipe)
    strategy = EveryDevice(ddp_comm_hook=commq.comm_hook, ddp_comm_state=handle, process_group_backend="gloo")
    x, model = torch.randn(128, 64), Sine()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x.sin()), batch_size=8))
    if trainer.is_global_zero:
        print(f"loss {model.losses[0]:.4f} to {model.losses[-1]:.4f}, bytes sent: {handle.stats().ratio:.3f} of fp32's")
    return model, handle


if __name__ == "__main__":
    train()
