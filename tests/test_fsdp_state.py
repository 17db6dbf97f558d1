"""Checkpoints of sharded training: to the bit at the same size, by a stated rule at another."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import commq
from commq.attach.dcp import count_states, pack_state, read_states
from commq.attach.fsdp_state import _join, _numel
from fsdp_cases import grid, line, made, run, same_bits, shard, train
from harness import process_ranks, thread_ranks

ROTATION, SIGN = commq.Rotation(size=32), commq.get_format("sign")
STATEFUL = ("sdp4bit", "loco", commq.recipe("loco", format="int4", feedback={"rule": "classic", "storage": "fp32"}))


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@process_ranks(2)
def test_resume_through_distributed_checkpoint(folder):
    for number, recipe in enumerate(STATEFUL):
        whole = run(recipe, steps=4)
        half = run(recipe, steps=2)
        states = dict(zip(("model", "optimizer"), get_state_dict(half.model, half.optimizer), strict=True))
        path = folder / str(number)
        dcp.save({**states, **half.handle.dcp_state()}, checkpoint_id=path)

        model = shard(made(), recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        fresh = train(model, 2, first=50, optimizer=optimizer)  # other steps: everything is loaded over something
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        fresh.handle.load_dcp(path)
        resumed = train(model, 2, first=2, optimizer=optimizer)
        assert all(
            torch.equal(resumed.grads[i][name], grad) for i in range(2) for name, grad in whole.grads[2 + i].items()
        )
        resumed.grads[:0] = half.grads
        same_bits(resumed, whole)
        assert resumed.handle.stats().steps == 4

        saved = read_states(path, range(count_states(path)))
        folded = commq.fold(saved[::-1], 3)  # each says whose it is
        check_sums(saved, folded, "first", 2, 3)


CLASSIC = {"rule": "classic", "storage": "fp32"}
BOTH = {"feedback": CLASSIC, "answer_feedback": CLASSIC}


@pytest.mark.parametrize("between", [False, True], ids=["two hops", "between hosts"])
@thread_ranks(4)
def test_what_padding_loses_is_not_missed(between):
    """Rotations, signs and levels without 0 send something for padding, too; shards here end within blocks."""
    if between:
        hybrid = commq.recipe("hybrid-shard", feedback=CLASSIC)
        recipes = [replace(hybrid, **options) for options in ({"rotation": ROTATION}, {"format": SIGN})]
    else:
        two = commq.recipe("int4", inside="int4", schedule="two_hop", rotation=32, **BOTH)
        rule = [{"pattern": "blocks.*.weight", "format": "sign"}]
        signs = commq.recipe("int8", schedule="two_hop", rules=rule, **BOTH)
        recipes = [two, signs, commq.recipe("int4", format="amq3", **BOTH)]
    for recipe in recipes:
        mesh = grid(2) if between else line((0, 0, 1, 1))
        whole = run(recipe, mesh=mesh, steps=2)
        model = shard(made(), recipe, mesh=mesh)
        for new, old in zip(model.parameters(), whole.model.parameters(), strict=True):
            new.data.copy_(old.data)
        commq.handle_of(model).load_state_dict(whole.handle.state_dict())
        on, resumed = train(whole.model, 1, first=2), train(model, 1, first=2)
        same_bits(resumed, on)


def check_sums(old, new, kind, old_size, new_size):
    """The sum over all ranks of each parameter's residual is kept (up to one rounding of the storage)."""
    for name, unit in old[0]["units"].items():
        for shard_ in unit["shards"]:
            key = f"{shard_[0]}#0"
            if key not in unit["residuals"][kind]["values"]:
                continue
            totals = [
                total(states, name, kind, tuple(shard_), size) for states, size in ((old, old_size), (new, new_size))
            ]
            limit = 0.02 if unit["residuals"][kind]["storage"] == "int8" else 1e-6
            assert (totals[0] - totals[1]).norm() <= limit * totals[0].norm()


def total(states, name, kind, shard_, size):
    from commq.codecs.reference import load_residual

    def values(state, row):
        residual = state["units"][name]["residuals"][kind]
        key = f"{shard_[0]}#{row}"
        found = load_residual(residual["values"][key], residual["scales"].get(key), residual["block"])
        assert found.numel() == _numel(shard_, size)
        return found

    if kind == "first":
        return sum(_join([values(state, row) for row in range(size)], shard_) for state in states)
    hosts = [states[i : i + size] for i in range(0, len(states), size)]
    return sum(_join([values(state, 0) for state in host], shard_) for host in hosts)


@thread_ranks(4)
def test_fold_between_hosts(folder):
    found = run("hybrid-shard", mesh=grid(2), steps=2)
    states = [None] * 4
    dist.all_gather_object(states, found.handle.state_dict())
    assert commq.fold(states, 2, replicas=2) is states
    for replicas, size in ((4, 1), (1, 3), (3, 2)):
        folded = commq.fold(states, size, replicas=replicas)
        assert len(folded) == replicas * size
        check_sums(states, folded, "between", 2, size)
    dcp.save(found.handle.dcp_state(), checkpoint_id=folder)
    handle = commq.handle_of(shard(made(), "hybrid-shard", mesh=grid(4)))
    handle.load_dcp(folder)
    mine, expected = handle.state_dict(), commq.fold(states, 1, replicas=4)[dist.get_rank()]
    assert mine["mesh"] == [4, 1] and mine["rank"] == dist.get_rank()
    for name, unit in expected["units"].items():
        for key, values in unit["residuals"]["between"]["values"].items():
            assert torch.equal(mine["units"][name]["residuals"]["between"]["values"][key], values)


def test_states_saved_on_gpus_are_read_on_the_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    saved = pack_state({"values": torch.arange(3)}, 0)
    monkeypatch.undo()
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    assert torch.equal(read_states(folder, [0])[0]["values"], torch.arange(3))


@thread_ranks(4)
def test_references_are_cut_anew():
    found = run("sdp4bit", mesh=line(), steps=2)
    states = [None] * 4
    dist.all_gather_object(states, found.handle.state_dict())
    there = commq.fold(states, 3)
    back = commq.fold(there, 4)
    for old, new in zip(states, back, strict=True):
        for name, unit in old["units"].items():
            assert torch.equal(unit["reference"], new["units"][name]["reference"])


@thread_ranks(2)
def test_a_state_of_something_else_is_refused():
    handle = run("loco", mesh=line(), steps=1).handle
    state = handle.state_dict()
    odd = copy.deepcopy(state)
    odd["units"]["other"] = odd["units"].pop("")
    with pytest.raises(ValueError, match="other FSDP modules than this model"):
        handle.load_state_dict(odd)
    odd = copy.deepcopy(state)
    odd["units"][""]["shards"][0][1] = [5, 5]
    with pytest.raises(ValueError, match="the state is of parameters"):
        handle.load_state_dict(odd)
    folded = commq.fold([state, state], 3)[0]
    with pytest.raises(ValueError, match="fold the states first"):
        handle.load_state_dict(folded)
    with pytest.raises(ValueError, match="expected those of all 2 ranks"):
        commq.fold([state], 3)
    with pytest.raises(ValueError, match="resume with the recipe they were saved with"):
        run("int8", mesh=line(), steps=1).handle.load_state_dict(state)
