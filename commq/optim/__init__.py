"""Optimizers: those that decide what is sent, a momentum in one bit in place of the gradient,

    opt = commq.optim.OneBitAdam(ddp, lr=1e-3, freeze_step=2000)

makes the optimizer and registers DDP's communication hook; the training loop stays as it is. And those that keep their
moments in few bits:

    opt = commq.optim.AdamW8bit(model.parameters(), lr=1e-3)
"""

from commq.optim.adam import OneBitAdam
from commq.optim.birder import Birder
from commq.optim.lamb import OneBitLamb
from commq.optim.low_bit import AdamW4bit, AdamW8bit, AdamWFp8, LowBitAdamW
from commq.optim.sign_sgd import EFSignSGD, OneBitSGD, SignSGD
from commq.optim.zero_one import ZeroOneAdam

__all__ = [
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "Birder",
    "EFSignSGD",
    "LowBitAdamW",
    "OneBitAdam",
    "OneBitLamb",
    "OneBitSGD",
    "SignSGD",
    "ZeroOneAdam",
]
