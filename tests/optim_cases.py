"""What the tests of the optimizers share: a small module, gradients, and one step of the compressed exchange."""

import torch
import torch.distributed as dist
from torch import nn

import commq

SHAPES = {"table": (40, 72), "matrix": (65, 51), "bias": (51,)}
"""Nothing is a multiple of a block; `bias` is exempt."""
DEAD_ROWS = slice(30, 40)
"""Rows of `table` that never have a gradient."""


class Weights(nn.Module):
    """Parameters without a model: tests hand them their gradients."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def gradient(name, step, rank, dtype=torch.float32):
    """Of one parameter on one rank: a pull to zero, the same on all ranks, and noise of very different sizes."""
    generator = torch.Generator().manual_seed(7919 * step + 31 * rank + len(name))
    noise = torch.randn(SHAPES[name], generator=generator) * torch.logspace(-4, 0, SHAPES[name][-1])
    if name == "table":
        noise[DEAD_ROWS] = 0.0
    return noise.to(dtype)


def set_gradients(module, step, rank=None, scale=1.0):
    for name, p in module.named_parameters():
        p.grad = gradient(name, step, dist.get_rank() if rank is None else rank, p.dtype) * scale


def parameters_of(module):
    return torch.cat([p.detach().float().flatten() for p in module.parameters()])


def same_on_all_ranks(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor.contiguous())
    return all(torch.equal(row, tensor) for row in rows)


class Exchange:
    """Equations of the compressed all-reduce for one parameter, all ranks at once (1-bit Adam, section 4.2).

    h_i = m_i + e_i ;  sent_i = C(h_i) ;  e_i <- h_i - sent_i
    h = mean of sent_i + e ;  sent = C(h) ;  e <- h - sent
    """

    def __init__(self, world_size, numel, fmt="sign", feedback=True):
        self.format, self.feedback = fmt, feedback
        self.lost = [torch.zeros(numel) for _ in range(world_size)]
        self.answer_lost = torch.zeros(numel)

    def code(self, x):
        return commq.decode(commq.encode(x, self.format, backend="reference"))

    def average(self, tensors):
        total = torch.zeros_like(self.answer_lost)
        for rank, x in enumerate(tensors):
            h = x.flatten() + self.lost[rank]
            sent = self.code(h)
            self.lost[rank] = (h - sent) * self.feedback
            total += sent
        h = total / len(tensors) + self.answer_lost
        sent = self.code(h)
        self.answer_lost = (h - sent) * self.feedback
        return sent.view_as(tensors[0])
