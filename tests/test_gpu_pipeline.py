"""Pipelines over NCCL: torch's own bits with fp32, the CPU's tiles, differences from every cache, nothing waited for.

Ranks may share one GPU.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

import commq
from commq.codecs import ops
from commq.codecs.tiles import TileLayout
from harness import process_ranks
from tile_cases import crosses_alike, decodes_alike, harder_inputs, outliers

ROWS, CHUNKS, WIDTH = 8, 4, 64


def make(number):
    torch.manual_seed(number)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).cuda()


def batch():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(2, ROWS, 16, WIDTH, generator=generator).cuda()


class Pipeline:
    def __init__(self, stage, schedule):
        self.stage, self.rank, self.last = stage, dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
        self.runs = schedule(stage, CHUNKS, loss_fn=lambda y, target: (y - target).square().mean())
        self.batch = batch()

    def step(self):
        if isinstance(self.stage, commq.PipelineStage):
            self.stage.set_samples(torch.arange(ROWS))
        self.stage.submod.zero_grad()
        x, target = self.batch
        self.runs.step(*([x] if self.rank == 0 else []), **({"target": target} if self.last else {}))
        return [p.grad.clone() for p in self.stage.submod.parameters()]


def stage(forward, backward="int8", **options):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    if forward is None:
        return pipelining.PipelineStage(make(rank), rank, world_size, device)
    return commq.PipelineStage(make(rank), rank, world_size, device, forward=forward, backward=backward, **options)


@process_ranks(2, 3, backend="nccl", share_gpu=True, timeout=240.0)
def test_fp32_has_the_bits_of_torch_and_others_come_near(tmp_path):
    torch.use_deterministic_algorithms(True)
    for schedule in (ScheduleGPipe, Schedule1F1B):
        plain = Pipeline(stage(None), schedule)
        expected = [plain.step() for _ in range(3)][-1]
        for ahead in (0, 1):
            same = Pipeline(stage("fp32", "fp32", ahead=ahead), schedule)
            for _ in range(3):
                got = same.step()
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        device, host = (commq.Differences(samples=ROWS, cache=cache) for cache in ("device", "host"))
        disk = commq.Differences(samples=ROWS, cache="disk", folder=tmp_path / schedule.__name__)
        for forward in ("int8", "tiles", device, host, disk):
            runs = [Pipeline(stage(forward), schedule) for _ in range(2)]
            gots = [[run.step() for _ in range(4)][-1] for run in runs]
            assert all(torch.equal(one, other) for one, other in zip(*gots, strict=True))
            for got, exact in zip(gots[0], expected, strict=True):
                assert float((got - exact).norm()) < 0.25 * float(exact.norm())


@process_ranks(2, backend="nccl", share_gpu=True, timeout=240.0)
def test_a_step_waits_for_the_device_no_more_often_than_torch_s_own():
    counts = {}
    for forward in (None, "int4", "tiles", commq.Differences(samples=ROWS, cache="device")):
        pipeline = Pipeline(stage(forward), ScheduleGPipe)
        for _ in range(3):
            pipeline.step()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                pipeline.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[str(forward)] = [w for w in caught if "called a synchronizing" in str(w.message)]
    for forward, found in counts.items():
        places = [f"{w.filename}:{w.lineno}" for w in found]
        assert len(found) <= len(counts["None"]), (forward, places)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tiles_have_the_bytes_of_the_cpu(backend, dtype):
    codec = ops.tile_implementation(backend, torch.device("cuda"))
    big = outliers(4 * 512 * 768, torch.Generator().manual_seed(7))  # its ranges fill most of one chunk
    for x in (*harder_inputs().values(), big, big.repeat(3)[:-1]):
        for share in (0.0, 0.2, 1.0):
            crosses_alike(codec, x.to(dtype), TileLayout(x.numel(), share), "cuda")
    layout = TileLayout(100_000, 0.4)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        wire = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=generator)
        decodes_alike(codec, wire, layout, dtype, "cuda")
