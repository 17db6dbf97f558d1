"""Optimizers that decide what is sent: a momentum in one bit, in place of the gradient.

    opt = commq.optim.OneBitAdam(ddp, lr=1e-3, freeze_step=2000)

makes the optimizer and registers DDP's communication hook; the training loop stays as it is.
"""

from commq.optim.adam import OneBitAdam
from commq.optim.birder import Birder
from commq.optim.lamb import OneBitLamb
from commq.optim.sign_sgd import EFSignSGD, OneBitSGD, SignSGD
from commq.optim.zero_one import ZeroOneAdam

__all__ = ["Birder", "EFSignSGD", "OneBitAdam", "OneBitLamb", "OneBitSGD", "SignSGD", "ZeroOneAdam"]
