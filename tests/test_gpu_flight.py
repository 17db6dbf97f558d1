"""Buckets under way on a side stream: the bits of those that wait for nobody, and nothing the host waits for."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.profiler import ProfilerActivity, profile

import commq
from against_plain import Net, batch, run, same_bits, same_on_all_ranks
from commq.collectives.arguments import PIECE_BYTES
from harness import process_ranks
from test_flight import one_by_one

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMalloc", "cudaFree")


def build():
    return DistributedDataParallel(Net(1280).cuda(), bucket_cap_mb=0.05)


def backward(model, step):
    model(batch(step).cuda()).square().mean().backward()


@process_ranks(2, backend="nccl", share_gpu=True, timeout=240.0)
@pytest.mark.parametrize("recipe", ["int4", "onebit", "doublesqueeze"])
def test_overlapped_buckets_have_the_same_bits(recipe, monkeypatch):
    monkeypatch.setitem(PIECE_BYTES, "cuda", 1 << 16)
    overlapped = run(build, backward, recipe)
    monkeypatch.setattr(commq.attach.ddp, "comm_hook", one_by_one)
    same_bits(run(build, backward, recipe), overlapped)
    assert same_on_all_ranks(parameters_to_vector(overlapped.parameters.values()).detach())


@process_ranks(2, backend="nccl", share_gpu=True, timeout=240.0)
def test_the_hook_neither_waits_nor_allocates():
    """In steady state: no call in the hook's ranges that waits for the device or asks the driver for memory."""
    model = build()
    commq.register(model, "int4")
    for step in range(12):  # DDP times its first ten steps
        model.zero_grad()
        backward(model, step)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for step in range(12, 15):
            model.zero_grad()
            backward(model, step)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    hooks = [event for event in events if event.name.startswith("commq::bucket")]
    assert len(hooks) >= 3 * 2
    for event in events:
        if event.name.startswith(WAITS):
            start = event.time_range.start
            assert not any(hook.time_range.start <= start <= hook.time_range.end for hook in hooks), event.name
