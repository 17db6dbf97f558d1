"""The part of the configuration that says in what precision a run computes, and what watches over it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    precision: str = "none"
    """GEMMs of the linear layers: none, as torch computes them; one of commq.lowp.recipes(), such as fp8, int8, mxfp4;
    or a TOML or YAML file of a policy by layers. Printed as a table before training starts."""
    schedule: str = ""
    """When another precision holds: 0.9=bf16 or 500=int8,0.5=fp8 (fraction or number of steps=precision), or
    cyclic=int4,int8,bf16:8, which --precision must be one of; empty: as the recipe says itself."""
    fallback: str = "none"
    """Precision for some steps after a loss spike, such as bf16; needs --guard watch or rollback."""
    fallback_steps: int = 50
    """Steps until the schedule's precision holds again."""
    monitor_every: int = 0
    """Steps between two measurements of SQNR, underflow and overflow of each layer's operands, by rank 0; such a step
    quantizes all operands once more, emulated, and waits for the device (on a CPU it takes twice as long). 0: never."""
    compile: bool = False
    """torch.compile attention and MLP of each block."""

    def __post_init__(self) -> None:
        if self.precision == "none" and (self.schedule or self.fallback != "none" or self.monitor_every):
            raise ValueError(
                "--schedule, --fallback and --monitor-every say how low precision changes and is watched; choose a "
                "--precision, such as bf16 or fp8"
            )
        if self.fallback_steps < 1 or self.monitor_every < 0:
            raise ValueError(
                f"fallback_steps={self.fallback_steps}, monitor_every={self.monitor_every}; expected at least 1, and 0 "
                "or more"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    guard: Literal["off", "watch", "rollback"] = "off"
    """watch: look at every step's loss and gradient before its update, which waits for the device: a loss spike starts
    the fallback, and what is not finite is traced to the first module that made it, with an error. rollback: also go
    back to the last good weights, optimizer state and residuals; the step goes on, so other data follow."""
    spike_deviations: float = 6.0
    """A loss is a spike if it is so many deviations of the last 50 losses, at least 1 % of their mean, above it."""
    snapshot_every: int = 25
    """Steps between two states to go back to; two are kept in the memory of the host."""
    max_rollbacks: int = 5
    """Rollbacks without 50 steps in between before the run ends with an error."""
    loss_scale: Literal["none", "dynamic"] = "none"
    """dynamic: multiply the loss by a power of two, halved when gradients overflow (that step is skipped) and doubled
    after 2000 steps without."""

    def __post_init__(self) -> None:
        if self.spike_deviations <= 0.0 or self.snapshot_every < 1 or self.max_rollbacks < 1:
            raise ValueError(
                f"spike_deviations={self.spike_deviations}, snapshot_every={self.snapshot_every}, "
                f"max_rollbacks={self.max_rollbacks}; expected positive numbers"
            )
