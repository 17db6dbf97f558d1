"""The optimizers on DistributedDataParallel and on sharded parameters, on real processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from commq.optim import Birder, EFSignSGD, OneBitAdam, OneBitLamb, OneBitSGD, SignSGD, ZeroOneAdam
from harness import process_ranks
from optim_cases import same_on_all_ranks

UNUSED = slice(40, 50)

KINDS = {
    OneBitAdam: {"freeze_step": 4},
    OneBitLamb: {"freeze_step": 4},
    ZeroOneAdam: {"var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 2},
    Birder: {},
    EFSignSGD: {},
    SignSGD: {},
    OneBitSGD: {"warmup_steps": 3},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 48)
        self.first = nn.Linear(48, 130)
        self.second = nn.Linear(130, 3)

    def forward(self, tokens):
        return self.second(torch.relu(self.first(self.table(tokens).mean(dim=1))))


def batch(step):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(0, UNUSED.start, (8, 6), generator=generator)


def loss_of(model, step):
    tokens = batch(step)
    target = torch.stack([tokens.float().mean(dim=1) / 20, tokens.float().std(dim=1) / 10, tokens.amax(dim=1) / 40], 1)
    return (model(tokens) - target).square().mean()


def make(kind, *, bucket_mb=25.0, **options):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Net(), bucket_cap_mb=bucket_mb)
    return ddp, kind(ddp, **(KINDS[kind] | options))


def train(ddp, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()


def parameters_of(ddp):
    return nn.utils.parameters_to_vector(ddp.parameters()).detach()


@process_ranks(3)
def test_all_optimizers_end_equal_on_all_ranks_whatever_the_buckets():
    for kind in KINDS:
        results = []
        for bucket_mb in (25.0, 0.01):
            ddp, optimizer = make(kind, bucket_mb=bucket_mb)
            rows = ddp.module.table.weight[UNUSED].detach().clone()
            train(ddp, optimizer, range(13))
            assert same_on_all_ranks(parameters_of(ddp)), kind
            results.append(parameters_of(ddp))
            if kind in (OneBitAdam, OneBitLamb, ZeroOneAdam):
                assert torch.equal(ddp.module.table.weight[UNUSED], rows), kind
        assert torch.equal(*results), kind
        assert results[0].isfinite().all() and not torch.equal(results[0], parameters_of(make(kind)[0]))


@process_ranks(2)
def test_accumulated_gradients_are_those_of_one_large_batch():
    whole, optimizer = make(OneBitAdam)
    parts, other = make(OneBitAdam)
    for step in range(8):
        for ddp, opt in ((whole, optimizer), (parts, other)):
            opt.zero_grad()
            if ddp is whole:
                (2 * loss_of(ddp, step)).backward()
            else:
                with ddp.no_sync():
                    loss_of(ddp, step).backward()
                loss_of(ddp, step).backward()
            opt.step()
        assert torch.equal(parameters_of(whole), parameters_of(parts)), step  # twice a gradient is exact


@process_ranks(2)
def test_clipping_and_schedulers_see_the_same_on_all_ranks():
    ddp, optimizer = make(OneBitAdam, lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        norm = nn.utils.clip_grad_norm_(ddp.parameters(), 0.01)
        assert same_on_all_ranks(norm)
        optimizer.step()
        scheduler.step()
        momenta = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
        assert step < 4 or float(momenta.norm()) <= 0.01 * (1 + 1e-5)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert same_on_all_ranks(parameters_of(ddp))


@process_ranks(2)
def test_a_state_moves_to_a_new_process_to_the_bit(tmp_path):
    for kind in (OneBitAdam, ZeroOneAdam):
        ddp, optimizer = make(kind, bucket_mb=0.01)
        train(ddp, optimizer, range(8))
        path = tmp_path / f"{kind.__name__}-{dist.get_rank()}.pt"
        torch.save({"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict()}, path)
        train(ddp, optimizer, range(8, 14))
        again, other = make(kind)
        saved = torch.load(path, weights_only=True)
        again.module.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        train(again, other, range(8, 14))
        assert torch.equal(parameters_of(ddp), parameters_of(again)), kind


@process_ranks(4)
def test_shards_are_exchanged_between_the_hosts_of_a_hybrid():
    """Two hosts of two ranks: FSDP2 within a host, momenta of the shards in one bit between hosts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    torch.manual_seed(0)
    model = Net()
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh["ranks"])
    optimizer = OneBitAdam(model, lr=1e-2, freeze_step=4, group=mesh["hosts"])
    first = last = 0.0
    for step in range(25):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        first, last = (float(total), last) if step == 0 else (first, float(total))
        for p in model.parameters():
            shards = [torch.empty_like(p.to_local()) for _ in range(2)]
            dist.all_gather(shards, p.to_local().detach().contiguous(), group=mesh["hosts"].get_group())
            assert torch.equal(*shards)
    assert last < first / 3
    with pytest.raises(ValueError, match="trust ratios"):
        OneBitLamb(model, group=mesh["hosts"])
