"""The Triton kernels of AdamW with encoded moments give the bits of `adamw_step`, interpreted and compiled."""

import importlib
import importlib.util
import os

import pytest
import torch

from commq.optim import AdamW4bit, AdamW8bit, AdamWFp8, adamw_step, low_bit
from interpreted import interpreting

CASES = [
    # kind, dtype, shape, update clipping, gradients
    (AdamW8bit, torch.float32, (5, 900), False, "normal"),
    (AdamW4bit, torch.float32, (33, 130), True, "normal"),
    (AdamW4bit, torch.bfloat16, (8, 515), False, "subnormal"),
    (AdamWFp8, torch.bfloat16, (16, 257), True, "huge"),
    (AdamW8bit, torch.float16, (54, 77), False, "nan"),
    (AdamW4bit, torch.float32, (20, 320), False, "normal"),  # rows of codes are multiples of 16 bytes
]


def gradient(kind, shape, generator):
    g = torch.randn(shape, generator=generator)
    if kind == "subnormal":
        g[::2] *= 1e-40
    elif kind == "huge":
        g[:, 3] *= 1e15
    elif kind == "nan":
        g[3, 5] = float("nan")
    return g


def states(case, device, backend):
    """Parameter and state after every step."""
    kind, dtype, shape, clips, grads = case
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
    optimizer = kind([p], lr=0.01, update_clipping=clips, stochastic_rounding=True, seed=7, backend=backend)
    for _ in range(2):
        p.grad = gradient(grads, shape, generator).to(device, dtype)
        optimizer.step()
        yield {"parameter": p.detach().cpu(), **{name: t.cpu() for name, t in optimizer.state[p].items()}}


def bits(tensor):
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    nan = tensor.isnan() if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=torch.bool)
    return tensor.contiguous().view(view).masked_fill(nan, -1 if view != torch.uint8 else 0)


def check(case, device):
    pairs = zip(states(case, device, "reference"), states(case, device, "triton"), strict=True)
    for step, (expected, found) in enumerate(pairs):
        for name, tensor in expected.items():
            different = bits(tensor) != bits(found[name])
            assert not different.any(), (step, name, different.nonzero()[:3], tensor[different][:3])


@pytest.fixture
def interpreted(monkeypatch):
    """Interpreted kernels in place of compiled ones."""
    with interpreting():
        kernels = importlib.import_module("commq.optim.triton_adamw")
        monkeypatch.setattr(
            low_bit, "implementation", lambda backend, device: kernels if backend == "triton" else adamw_step
        )
        yield


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")
def test_interpreted(interpreted, case):
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")
def test_compiled(case):
    assert os.environ.get("TRITON_INTERPRET") != "1"
    check(case, "cuda")
