"""Ranks on GPUs of their own: a thousand steps under load leave replicas equal; CUDA graphs; torch.compile."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import commq
from commq.attach.check import bit_hash, check_replicas
from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel
from commq.collectives.group import transport_of
from harness import run_processes

pytestmark = pytest.mark.gpu
NCCL = {"backend": "cpu:gloo,cuda:nccl", "timeout": 240.0}
AVG = dist.ReduceOp.AVG
STEPS = 1000
WIDTH = 512


class Load:
    """Other work on the device, of another length on every rank: what waits for too little is found out."""

    def __init__(self, device, seed):
        self.device, self.random = device, random.Random(1000 * seed + dist.get_rank())
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            self.stream = torch.cuda.Stream()
            self.big = torch.zeros(2, 16 << 20, device=device)

    def sleep(self):
        if self.on_gpu:
            torch.cuda._sleep(self.random.randrange(200_000))

    def hammer(self):
        """Copies of 64 MiB on a stream of their own, and memory that is full of NaN when it is given away."""
        for _ in range(self.random.randrange(3) if self.on_gpu else 0):
            with torch.cuda.stream(self.stream):
                self.big[0].copy_(self.big[1])
        for _ in range(2):
            torch.full((self.random.randrange(1, WIDTH * WIDTH),), float("nan"), device=self.device)


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, load):
        ctx.load = load
        load.sleep()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.load.sleep()
        return grad, None


class Net(nn.Module):
    def __init__(self, load=None, layers=3):
        super().__init__()
        self.load = load
        self.first = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x if self.load is None else _Pause.apply(x, self.load))
        return self.head(x)


def make(device, load=None, **options):
    torch.manual_seed(0)
    return Net(load, **options).to(device)


def adam(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-3, **options)


def train(model, optimizer, load, device, steps, check, *, alike=False):
    """alike: all ranks see the same data. `check` is called every 50 steps, and at the end."""
    generator = torch.Generator(device).manual_seed(0 if alike else dist.get_rank())
    for step in range(steps):
        x = torch.randn(16, 64, generator=generator, device=device)
        optimizer.zero_grad()
        load.hammer()
        (model(x) - x).square().mean().backward()
        load.sleep()
        optimizer.step()
        if step % 50 == 49 or step == steps - 1:
            check(step)


def finite(module):
    return all(
        bool(p.to_local().isfinite().all() if hasattr(p, "to_local") else p.isfinite().all())
        for p in module.parameters()
    )


def data_parallel(name, device, steps):
    load = Load(device, 1)
    ddp = DistributedDataParallel(make(device, load), bucket_cap_mb=0.5)
    transport, checks = transport_of(None), []
    if name == "onebit-adam":
        optimizer = commq.optim.OneBitAdam(ddp, lr=1e-4, freeze_step=100)
    elif name == "zero-one-adam":
        optimizer = commq.optim.ZeroOneAdam(
            ddp, lr=1e-4, var_freeze_step=100, local_step_scaler=200, local_step_clipper=8
        )
    else:
        commq.register(ddp, name, check_every=50)
        optimizer = adam(ddp.parameters())

    def check(step):
        if getattr(optimizer, "synchronized", True):
            check_replicas(dict(ddp.module.named_parameters()), transport, step)
            checks.append(step)

    def check_when_they_meet(step):
        check(step)
        for extra in range(20 if name == "zero-one-adam" and checks[-1:] != [step] else 0):
            if optimizer.synchronized:
                break
            x = torch.randn(16, 64, device=device)
            optimizer.zero_grad()
            (ddp(x) - x).square().mean().backward()
            optimizer.step()
            check(step + extra + 1)

    train(ddp, optimizer, load, device, steps, check_when_they_meet)
    assert len(checks) >= steps // 50 and finite(ddp), (name, checks)


def sharded(name, device, steps, mesh=None):
    """Masters are shards: what has to be the same on all ranks are the parameters that each forward pass computes with.

    All of their bits, of all steps, go into one number.
    """
    load = Load(device, 2)
    model = make(device, load)
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        commq.fully_shard(part, mesh=mesh, recipe=name)
    total = torch.zeros((), dtype=torch.int64, device=device)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def watch(module, *_):
        with torch.no_grad():
            total.mul_(3).add_(bit_hash(module.weight))

    for linear in linears:
        linear.register_forward_hook(watch)

    def check(step):
        totals = transport_of(None).share(int(total))
        assert len(set(totals)) == 1 and totals[0] != 0, f"{name}: parameters differ after step {step}: {totals}"

    train(model, adam(model.parameters()), load, device, steps, check)
    assert finite(model), name


def tensor_parallel(device, steps):
    """Layers that every rank holds in full stay equal without being exchanged."""
    if device == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    load = Load(device, 3)
    model = make(device, load, layers=2)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    parallelize_module(
        model, mesh, {"blocks.0.0": ColwiseParallel(format="int8"), "blocks.1.0": RowwiseParallel(format="spike5")}
    )
    replicated = {name: p for name, p in model.named_parameters() if not name.startswith("blocks")}

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            x = model.first(x)
            middle = model.blocks[0](_Pause.apply(x, load))
            return model.head(x + model.blocks[1](_Pause.apply(middle, load)))

    def check(step):
        check_replicas(replicated, transport_of(None), step)

    train(Chain(), adam(model.parameters(), foreach=False), load, device, steps, check, alike=True)
    assert finite(model)


def timed(modes, device, steps):
    seconds = {}
    for name, run in modes.items():
        start = time.monotonic()
        run(device, steps)
        seconds[name] = round(time.monotonic() - start, 2)
    return seconds


def data_parallel_modes(device, steps):
    names = "int8", "int4", "onebit", "onebit-adam", "zero-one-adam"
    return timed({n: lambda *a, n=n: data_parallel(n, *a) for n in names}, device, steps)


def sharded_modes(device, steps):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    modes = {n: lambda *a, n=n: sharded(n, *a) for n in ("full-shard", "sdp4bit")}
    return timed({**modes, "tensor parallel": tensor_parallel}, device, steps)


def hybrid_modes(device, steps):
    mesh = init_device_mesh(device, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return timed({"hybrid-shard": lambda *a: sharded("hybrid-shard", *a, mesh=mesh)}, device, steps)


@pytest.mark.parametrize("ranks, modes", [(2, data_parallel_modes), (2, sharded_modes), (4, hybrid_modes)])
def test_replicas_are_equal_after_a_thousand_steps_under_load(ranks, modes):
    print(run_processes(modes, ranks, args=("cuda", STEPS), **NCCL)[0])


class Captured:
    """A call, and the same call as a CUDA graph; `use(x)` copies what it works on."""

    def __init__(self, call):
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Other threads, such as NCCL's watchdog, ask for events meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            call()

    def __call__(self):
        self.graph.replay()


def capture_collectives():
    """The replay of a collective has the bits of the call, with and without a residual."""
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    inputs = [torch.randn(70_001, generator=generator, device="cuda") for _ in range(4)]
    for schedule, name in (
        ("two_shot", "int4"),
        ("two_shot", "int8"),
        ("one_shot", "int4"),
        ("plain", "bf16"),
        ("plain", "int8"),
    ):
        for feeds in (False, True) if name == "int4" else (False,):

            def outputs(captured, schedule=schedule, name=name, feeds=feeds):
                x, residual = torch.empty_like(inputs[0]), torch.zeros_like(inputs[0]) if feeds else None

                def call():
                    commq.all_reduce(x, AVG, format=name, schedule=schedule, residual=residual)

                found = []
                for i, each in enumerate(inputs):
                    x.copy_(each)
                    if captured and i == 1:
                        call_again = Captured(call)
                    call_again() if captured and i else call()
                    found.append(x.clone())
                torch.cuda.synchronize()
                return [*found, *([residual] if feeds else [])]

            for a, b in zip(outputs(False), outputs(True), strict=True):
                assert torch.equal(a, b), (schedule, name, feeds)


def capture_step():
    """Forward, backward, exchange with error feedback and optimizer as one graph: the bits of eager steps."""
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    batches = [torch.randn(16, 64, generator=generator, device="cuda") for _ in range(8)]

    def parameters_after(captured):
        model = make("cuda")
        parameters = list(model.parameters())
        flat = torch.zeros(sum(p.numel() for p in parameters), device="cuda")
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
        residual, x = torch.zeros_like(flat), torch.empty_like(batches[0])
        optimizer = adam(parameters, capturable=True)

        def step():
            flat.zero_()
            (model(x) - x).square().mean().backward()
            commq.all_reduce(flat, AVG, format="int4", schedule="two_shot", residual=residual)
            optimizer.step()

        stream = torch.cuda.Stream()
        for i, batch in enumerate(batches):
            x.copy_(batch)
            if captured and i == 3:
                again = Captured(step)
            if captured and i >= 3:
                again()
                continue
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        return [*(p.detach().clone() for p in parameters), residual]

    eager, replayed = parameters_after(False), parameters_after(True)
    for a, b in zip(eager, replayed, strict=True):
        assert torch.equal(a, b)
    check_replicas({str(i): p for i, p in enumerate(replayed[:-1])}, transport_of(None), 8)


def refuse_what_cannot_be_captured():
    """The last of this process: a capture that was broken off."""
    ddp = DistributedDataParallel(make("cuda"))
    commq.register(ddp, "int4")
    x = torch.randn(16, 64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(11):
            ddp(x).sum().backward()
    seen = []
    try:
        Captured(lambda: ddp(x).sum().backward())
    except Exception as error:  # the capture's own end may fail, too, and hide the first error behind its own
        while error is not None:
            seen.append(str(error))
            error = error.__context__
    assert any("commq's hook of DDP cannot be captured" in text for text in seen), seen


def captures():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    capture_collectives()
    capture_step()
    refuse_what_cannot_be_captured()


def test_cuda_graphs_have_the_bits_of_eager_calls_and_hooks_are_refused():
    run_processes(captures, 2, **NCCL)


def compiled(device):
    """A compiled model in DDP with commq's hook: the gradients of the eager one, the same on all ranks."""
    found = []
    for compiles in (False, True):
        ddp = DistributedDataParallel(make(device, layers=4), bucket_cap_mb=1.5)
        commq.register(ddp, "int4")
        model = torch.compile(ddp) if compiles else ddp
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-2)
        generator = torch.Generator(device).manual_seed(dist.get_rank())
        for _ in range(4):
            x = torch.randn(16, 64, generator=generator, device=device)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        check_replicas(dict(ddp.module.named_parameters()), transport_of(None), 4)
        found.append(torch.cat([p.grad.flatten() for p in ddp.parameters()]))
    eager, other = found
    assert float((eager - other).norm() / eager.norm()) < 0.02


def test_a_compiled_model_in_ddp():
    run_processes(compiled, 2, args=("cuda",), **NCCL)
