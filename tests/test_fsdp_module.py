"""commq.FSDP: the arguments and methods of FullyShardedDataParallel."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

import commq
from commq.attach import fsdp_arguments
from commq.collectives.hosts import HOSTS, Hosts
from commq.collectives.memory import memory_of
from fsdp_cases import RAW, Net, batch, error, loss, made, run, same_on_all_ranks, whole
from harness import process_ranks, thread_ranks


def wrapped(model):
    return [name for name, module in model.module.named_modules() if isinstance(module, FSDPModule)]


@process_ranks(2)
def test_it_trains_as_fully_shard_does():
    plain = run(None)
    model = commq.FSDP(made(), recipe=RAW, auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}))
    assert wrapped(model) == ["", "blocks.0", "blocks.1"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    found = model.full_state_dict()
    assert found.keys() == (plain.parameters.keys() if dist.get_rank() == 0 else set())
    for name, parameter in found.items():
        assert torch.equal(parameter, plain.parameters[name]), name
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), plain.parameters[name]), name
    assert get_model_state_dict(model).keys() == model.state_dict().keys() == plain.parameters.keys()

    with model.no_sync():
        loss(model, 7).backward()
    assert model.handle.stats().steps == 3
    loss(model, 8).backward()
    norm = torch.linalg.vector_norm(torch.cat([whole(p.grad).flatten() for p in model.parameters()]))
    assert torch.allclose(model.clip_grad_norm_(0.1), norm, rtol=1e-5)
    clipped = torch.linalg.vector_norm(torch.cat([whole(p.grad).flatten() for p in model.parameters()]))
    assert torch.allclose(clipped, torch.tensor(0.1), rtol=1e-4)

    state = {name: torch.full(p.shape, 0.25) for name, p in Net().named_parameters()}
    model.load_full_state_dict(state if dist.get_rank() == 0 else {}, broadcast=True)
    assert all(bool((whole(p) == 0.25).all()) for p in model.parameters())


@process_ranks(2)
def test_whole_parameters():
    model = commq.FSDP(made(), None, "SHARD_GRAD_OP", recipe="sdp4bit", auto_wrap_policy={nn.Sequential})
    exact = dict(made().named_parameters())
    loss(model, 0).backward()
    with commq.FSDP.summon_full_params(model, with_grads=True):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, exact[name]) and parameter.grad.shape == parameter.shape
        with torch.no_grad():
            model.module.head.weight.fill_(0.5)
            model.module.blocks[0][0].weight.mul_(2)
    assert bool((whole(model.module.head.weight) == 0.5).all())
    assert torch.equal(whole(model.module.blocks[0][0].weight), exact["blocks.0.0.weight"] * 2)
    loss(model, 1)  # the references were told: what the forward pass computes with is the new weight, not a step to it
    model.module.blocks[0].unshard()
    assert torch.equal(model.module.blocks[0][0].weight, exact["blocks.0.0.weight"] * 2)
    with commq.FSDP.summon_full_params(model, writeback=False, rank0_only=True):
        assert isinstance(model.module.head.weight, nn.Parameter)
        assert (type(model.module.head.weight.data) is torch.Tensor) == (dist.get_rank() == 0)
    with pytest.raises(ValueError, match="rank0_only"), commq.FSDP.summon_full_params(model, rank0_only=True):
        pass


@thread_ranks(4)
def test_strategies():
    world = dist.group.WORLD
    memory_of(world).facts[HOSTS] = Hosts((0, 0, 1, 1))
    expected = {
        "FULL_SHARD": ("full-shard", 4, True),
        "SHARD_GRAD_OP": ("sdp4bit", 4, False),
        "HYBRID_SHARD": ("hybrid-shard", 2, True),
        "_HYBRID_SHARD_ZERO2": ("hybrid-shard", 2, False),
        "NO_SHARD": ("hybrid-shard", 1, True),
    }
    exact = run(None, steps=1, mesh=dist.device_mesh.init_device_mesh("cpu", (4,))).grads[0]
    for strategy, (recipe, size, reshards) in expected.items():
        model = commq.FSDP(made(), sharding_strategy=strategy, auto_wrap_policy={nn.Sequential})
        unit = model.handle.units["blocks.0"].unit
        assert (unit.recipe.name, unit.layout.world_size) == (recipe, size)
        assert (unit.layout._group.post_forward_mesh_info is not None) == reshards
        loss(model, 0).backward()
        grads = {name: whole(p.grad) for name, p in model.named_parameters()}
        assert error(grads, exact) < 0.25
        assert all(same_on_all_ranks(grad) for grad in grads.values())
        assert model.handle.stats().sent_bytes > 0


@thread_ranks(4)
def test_groups_and_meshes():
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    model = commq.FSDP(made(), process_group=groups[rank // 2], recipe=RAW)
    assert model.handle.units[""].unit.layout.world_size == 2
    model = commq.FSDP(made(), (groups[rank // 2], groups[2 + rank % 2]), ShardingStrategy.HYBRID_SHARD, recipe="int8")
    loss(model, 0).backward()
    assert all(same_on_all_ranks(whole(p.grad)) for p in model.parameters())
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("replicate", "shard"))
    commq.FSDP(made(), device_mesh=mesh, sharding_strategy="HYBRID_SHARD")
    with pytest.raises(ValueError, match="of 2 dimensions with FULL_SHARD: expected 1"):
        commq.FSDP(made(), device_mesh=mesh)
    with pytest.raises(ValueError, match="expected one of them"):
        commq.FSDP(made(), groups[0], device_mesh=mesh)
    with pytest.raises(ValueError, match="weights are gathered inside a host only"):
        commq.FSDP(made(), device_mesh=mesh, sharding_strategy="HYBRID_SHARD", recipe="zero++")
    with pytest.raises(ValueError, match="expected one of FULL_SHARD"):
        commq.FSDP(made(), sharding_strategy="ZERO4")


@thread_ranks(2)
def test_initialisation():
    model = made()
    if dist.get_rank() == 1:
        for parameter in model.parameters():
            parameter.data.zero_()
    model = commq.FSDP(
        model, recipe=RAW, sync_module_states=True, auto_wrap_policy={nn.Sequential}, device_id=torch.device("cpu")
    )
    exact = dict(made().named_parameters())
    assert all(torch.equal(whole(p), exact[name]) for name, p in model.named_parameters())

    with torch.device("meta"):
        model = Net()

    def init(module):
        module.to_empty(device="cpu", recurse=False)
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 0.5)

    model = commq.FSDP(model, recipe=RAW, param_init_fn=init, auto_wrap_policy={nn.Sequential})
    assert all(bool((whole(p) == 0.5).all()) for p in model.parameters())
    with torch.device("meta"):
        model = commq.FSDP(Net(), recipe=RAW, sync_module_states=True)
    assert all(same_on_all_ranks(whole(p)) and not p.is_meta for p in model.parameters())


@thread_ranks(2)
def test_precision_offload_and_ignored():
    model = made()
    model.register_buffer("table", torch.ones(3))
    model = commq.FSDP(
        model, recipe="full-shard", mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16)
    )
    assert model.table.dtype == torch.bfloat16
    assert model(batch(0)).dtype == torch.bfloat16
    loss(model, 0).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    for offload in (CPUOffload(offload_params=True), True):
        model = commq.FSDP(made(), recipe=RAW, cpu_offload=offload, mixed_precision=MixedPrecisionPolicy())
        loss(model, 0).backward()
    model = made()
    model = commq.FSDP(model, recipe=RAW, ignored_modules=[model.blocks[0]], auto_wrap_policy={nn.Sequential})
    assert wrapped(model) == ["", "blocks.1"]
    assert type(model.module.blocks[0][0].weight.data) is torch.Tensor
    model = made()
    model = commq.FSDP(model, recipe=RAW, ignored_states=[model.head.weight])
    assert type(model.module.head.weight.data) is torch.Tensor
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=10000)
    assert wrapped(commq.FSDP(made(), recipe=RAW, auto_wrap_policy=policy)) == ["", "blocks.0", "blocks.1"]
    with pytest.raises(TypeError, match="auto_wrap_policy is a int"):
        commq.FSDP(made(), recipe=RAW, auto_wrap_policy=3)
    with pytest.raises(TypeError, match="expected modules or parameters"):
        commq.FSDP(made(), recipe=RAW, ignored_states=["head"])
    with pytest.raises(ValueError, match="expected one of them"):
        commq.FSDP(made(), recipe=RAW, ignored_states=[], ignored_modules=[])
    with pytest.raises(TypeError, match="unexpected keyword"):
        commq.FSDP(made(), recipe=RAW, colour="blue")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("backward_prefetch", BackwardPrefetch.BACKWARD_POST),
        ("forward_prefetch", True),
        ("limit_all_gathers", False),
        ("use_orig_params", False),
    ],
)
def test_what_means_nothing_any_more_warns_once(argument, value):
    given = {
        "backward_prefetch": BackwardPrefetch.BACKWARD_PRE,
        "forward_prefetch": False,
        "limit_all_gathers": True,
        "use_orig_params": None,
    }
    fsdp_arguments._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fsdp_arguments.check_obsolete(**given)
    with pytest.warns(UserWarning, match=f"{argument} has no effect") as found:
        for _ in range(2):
            fsdp_arguments.check_obsolete(**given | {argument: value})
    assert len(found) == 1
