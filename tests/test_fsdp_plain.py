"""commq.fully_shard with raw formats against torch's fully_shard: the same bits, whatever FSDP2 is asked to do.

With two ranks both round the sum of two numbers once and halve it exactly. Gradients that are small whole numbers have
exact sums for any number of ranks.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

import commq
from commq.collectives.memory import memory_of
from fsdp_cases import RAW, Even, Net, line, loss, made, run, same_bits, shard, train, whole
from harness import process_ranks, thread_ranks
from numerics import mean_rounding


def check(**options):
    plain, found = run(None, **options), run(RAW, **options)
    assert any(grad is not None and bool(grad.any()) for grad in plain.grads[-1].values())
    same_bits(found, plain)
    return found


@process_ranks(2)
def test_modes():
    check()
    check(make=Even)
    check(blocks=False)
    check(reshard_after_forward=True)
    check(reshard_after_forward=False)
    check(micro=3)
    check(micro=3, synced=True)
    check(clip=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        check(mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    check(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    check(build=lambda model: model.to(torch.bfloat16))
    check(offload_policy=CPUOffloadPolicy(pin_memory=False))
    check(build=checkpoint)
    check(build=checkpoint, reshard_after_forward=True, micro=2)


def checkpoint(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Sequential))


@process_ranks(2)
def test_parameters_without_gradients():
    def frozen(model):
        model.blocks[0][0].weight.requires_grad_(False)
        model.first.requires_grad_(False)

    check(build=frozen)

    class Sometimes(Net):
        """Parameters of equal length, of which one gets no gradient in every second step."""

        def __init__(self):
            super().__init__()
            self.other = nn.Linear(37, 66)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls % 2:
                return super().forward(x)
            x = self.other(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    found = check(make=Sometimes, steps=4)
    assert found.grads[0]["other.weight"] is None and found.grads[1]["first.weight"] is None


@process_ranks(2)
def test_prefetching_and_divide_factor_and_compiled_blocks():
    def both(change):
        runs = []
        for recipe in (None, RAW):
            model = shard(made(), recipe)
            change(model)
            runs.append(train(model))
        same_bits(*runs)

    def prefetch(model):
        model.set_modules_to_forward_prefetch(list(model.blocks))
        model.blocks[1].set_modules_to_backward_prefetch([model.blocks[0]])
        model._set_unshard_async_op(True)

    def compiled(model):
        for block in model.blocks:
            block.compile(backend="eager")

    both(prefetch)
    both(compiled)
    for recipe in (None, RAW):  # gloo has no PREMUL_SUM, so the exact result is the reference
        model = shard(made(), recipe or RAW)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0 if recipe else 2.0)
        grads = train(model, 1).grads[0]
        expected = run(None, steps=1).grads[0]
        for name, grad in grads.items():
            assert torch.equal(grad, expected[name] * (2.0 if recipe else 1.0)), name


@thread_ranks(3, 4)
def test_meta_device_and_placements():
    """Parameters sharded along another dimension; materialised after sharding."""
    from torch.distributed.tensor import Shard

    class Integers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(5, 12)), nn.Parameter(torch.zeros(10))

        def forward(self, x):
            return (self.a * x).sum() + self.b.sum()

    with torch.device("meta"):
        model = Integers()
    commq.fully_shard(model, mesh=line(), recipe=RAW, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    model.to_empty(device="cpu")
    x = torch.arange(60.0).view(5, 12) * (dist.get_rank() + 1)
    model(x).backward()
    mean = torch.arange(60.0).view(5, 12) * sum(range(1, dist.get_world_size() + 1)) / dist.get_world_size()
    assert torch.equal(whole(model.a.grad), mean)
    assert torch.equal(whole(model.b.grad), torch.ones(10))


@thread_ranks(4)
def test_experts_on_a_mesh_of_their_own():
    """Modules may be sharded over other ranks than the rest; one module's parameters may not."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "expert"))
    models = [made(), made()]
    for model, apply in zip(models, (fully_shard, functools.partial(commq.fully_shard, recipe=RAW)), strict=True):
        apply(model.blocks[0], mesh=mesh["expert"])
        apply(model, mesh=line())
        loss(model, 0).backward()
    alone = made()
    loss(alone, 0).backward()
    for own, plain, found in zip(*(model.parameters() for model in (alone, *models)), strict=True):
        ranks = plain.device_mesh.size()
        assert found.device_mesh.size() == ranks
        rows = [torch.empty_like(own.grad) for _ in range(ranks)]
        dist.all_gather(rows, own.grad, group=plain.device_mesh.get_group())
        both_orders = 2 * mean_rounding(torch.stack(rows))
        assert bool(((whole(found.grad) - whole(plain.grad)).abs() <= both_orders).all())
    with pytest.raises(ValueError, match="sharded over several meshes"):
        model, whole_mesh = made(), FSDPMeshInfo(line(), shard_mesh_dim=0)
        special = ShardPlacementResult(None, FSDPMeshInfo(mesh["expert"], shard_mesh_dim=0))
        usual = ShardPlacementResult(None, whole_mesh)
        commq.fully_shard(
            model, mesh=line(), recipe=RAW, shard_placement_fn=lambda p: special if p is model.head.weight else usual
        )


@process_ranks(2)
def test_modules_sharded_together_and_names_without_wrappers():
    found = []
    for apply in (fully_shard, functools.partial(commq.fully_shard, recipe=RAW)):
        model = made()
        checkpoint(model)
        apply([model.blocks[1], model.head])
        apply(model)
        found.append(train(model))
    same_bits(*found)
    names = [shard_.name for each in found[1].handle.units.values() for shard_ in each.unit.layout.shards]
    assert sorted(names) == sorted(name for name, _ in Net().named_parameters())


@process_ranks(1)
def test_alone():
    same_bits(run("full-shard"), run(None))


@thread_ranks(2)
def test_what_cannot_be_compressed_is_refused():
    mesh = line()
    model = Net()
    model.head.weight = nn.Parameter(model.head.weight.double())
    with pytest.raises(ValueError, match=r"head.weight is torch.float64, expected float32"):
        shard(model, RAW, mesh=mesh)
    model = Net().to(torch.bfloat16)
    model.head.weight = nn.Parameter(model.head.weight.float())
    with pytest.raises(ValueError, match="expected one dtype"):
        shard(model, RAW, mesh=mesh)
    with pytest.raises(ValueError, match="reshard_after_forward=False"):
        shard(Net(), "sdp4bit", mesh=mesh, reshard_after_forward=True)
    with pytest.raises(ValueError, match="schedule 'one_bit'"):
        shard(Net(), "marsit", mesh=mesh)
    with pytest.raises(ValueError, match="differs between ranks"):
        shard(Net(), ("int8", "int4")[dist.get_rank()], mesh=mesh)
    with pytest.raises(TypeError, match="unexpected keyword"):
        shard(Net(), RAW, mesh=mesh, colour="blue")
    with pytest.raises(ValueError, match="which DDP does not send"):
        commq.HookState("sdp4bit")
    with pytest.raises(KeyError, match="was not given to"):
        commq.handle_of(Net())
    odd = shard(Net(), commq.recipe("int8", rules=[{"pattern": "x.*", "format": "int4"}]), mesh=mesh)
    with pytest.raises(ValueError, match="matches no parameter"):
        loss(odd, 0)
    model = shard(Net(), RAW, mesh=mesh, reshard_after_forward=True)
    loss(model, 0).backward()


@thread_ranks(2)
def test_bytes_are_counted_once_while_several_units_travel():
    model = shard(made(), "full-shard", mesh=line())
    memory = memory_of(line().get_group())
    before = memory.sent_bytes
    work = [block.unshard(async_op=True) for block in model.blocks]
    for each in work:
        each.wait()
    assert commq.handle_of(model).stats().sent_bytes == memory.sent_bytes - before > 0
