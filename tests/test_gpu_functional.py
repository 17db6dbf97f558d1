"""Differentiable exchanges, styles and experts over NCCL: the same bits as over gloo on the CPU, in both directions."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from commq.attach.experts import Experts
from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel
from harness import rank_generator, run_processes
from test_functional import ADJOINT, CALLS

pytestmark = pytest.mark.gpu
NCCL = {"backend": "cpu:gloo,cuda:nccl", "share_gpu": True, "timeout": 240.0}


def exchange(device):
    """Values and gradients of every exchange, in formats that GPUs code natively and in Triton."""
    world_size = dist.get_world_size()
    for kind, call in CALLS.items():
        for format, backward in (("int8", "spike5"), ("spike3", "spike4"), ("bf16", "int8")):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(world_size, 1003, world_size, generator=rank_generator(1)).to(device, dtype)
                x[..., 0] *= 100.0
                x.requires_grad_()
                one_way = kind in ("replicate", "shard")
                y = call(x, 0, format=format) if one_way else call(x, 0, format=format, backward=backward)
                y.backward(torch.randn(y.shape, generator=rank_generator(2)).to(device, dtype))
                yield f"{kind} {format} {dtype}", y
                yield f"{ADJOINT[kind]} of the gradient, {backward} {dtype}", x.grad


def layers(device):
    """Whole numbers, so that products do not depend on the device."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(3)).to(torch.float32)

    mlp = nn.Sequential(nn.Linear(64, 12 * world_size), nn.ReLU(), nn.Linear(12 * world_size, 64))
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(whole(*parameter.shape))
    mesh = DeviceMesh.from_group(dist.new_group(), device)
    plan = {"0": ColwiseParallel(format="spike5"), "2": RowwiseParallel(format="int8")}
    parallelize_module(mlp.to(device), mesh, plan)
    x = whole(5, 64).to(device).requires_grad_()
    y = mlp(x)
    y.backward(whole(5, 64).to(device))
    yield "mlp", y
    yield "gradient of mlp", x.grad
    expert = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        expert.weight.copy_(whole(64, 64))
    choice = torch.randint(0, world_size, (7 * rank, 2), generator=rank_generator(4)).to(device)
    x = (whole(7 * rank, 64).sign() * 3.0).to(device).requires_grad_()  # exact in int8
    y = Experts([expert.to(device)], group=mesh)(x, choice, torch.ones(7 * rank, 2, device=device))
    y.sum().backward()
    yield "experts", y
    yield "gradient of experts", x.grad
    yield "gradient of an expert's weight", expert.weight.grad


def everything(device):
    return [(what, tensor.detach().cpu()) for part in (exchange, layers) for what, tensor in part(device)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_nccl_gives_the_same_bits_as_gloo(ranks):
    on_cpu = run_processes(everything, ranks, args=("cpu",), timeout=240)
    on_gpu = run_processes(everything, ranks, args=("cuda",), **NCCL)
    for rank, (here, there) in enumerate(zip(on_cpu, on_gpu, strict=True)):
        for (what, a), (_, b) in zip(here, there, strict=True):
            assert torch.equal(a, b), f"rank {rank}: {what}"
