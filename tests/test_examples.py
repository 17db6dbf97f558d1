"""launch/examples: each trains on real ranks, and checkpoints go on at another world size."""

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commq
from against_plain import same_on_all_ranks, vector
from harness import process_ranks, run_processes

EXAMPLES = Path(__file__).parent.parent / "launch" / "examples"


def example(name):
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def go_on(folder, recipe):
    """Residual of this rank before and after 10 more steps, where there is a checkpoint, and the losses."""
    plain, before = example("plain"), {}
    load = commq.HookState.load_dcp

    def noted(handle, path):
        load(handle, path)
        before.update(handle.state_dict())

    commq.HookState.load_dcp = noted
    made = []
    register = commq.register
    commq.register = lambda *args: made.append(register(*args)) or made[0]
    losses = plain.train(folder, recipe=recipe)
    return before, made[0].state_dict(), losses


def sums(states):
    """Of the residuals over the ranks, and of their magnitudes, by name."""
    names = states[0]["residual"]["values"]
    rows = {name: torch.stack([state["residual"]["values"][name] for state in states]).double() for name in names}
    return {name: (row.sum(dim=0), row.abs().sum(dim=0)) for name, row in rows.items()}


@pytest.mark.parametrize("recipe", ["int4", "doublesqueeze"])
def test_checkpoints_go_on_at_any_world_size(tmp_path, recipe):
    """4 ranks, then 4, 2 and 3: the same bits at 4, the same sum at all; the loss goes on falling."""
    folder, losses = tmp_path / "checkpoint", []
    saved, world_size = None, 4
    for now in (4, 4, 2, 3):
        results = run_processes(go_on, now, args=(folder, recipe))
        before, after = [first for first, _, _ in results], [second for _, second, _ in results]
        losses.append(results[0][2])
        if saved is not None:
            assert {state["step"] for state in before} == {saved[0]["step"]}
            old, new = sums(saved), sums(before)
            assert old.keys() == new.keys() and len(new) == 2
            for name, (total, magnitude) in old.items():
                assert bool((magnitude > 0).any())
                assert bool(((new[name][0] - total).abs() <= 2.0**-21 * magnitude).all()), name
                if now == world_size:
                    for left, right in zip(saved, before, strict=True):
                        assert torch.equal(left["residual"]["values"][name], right["residual"]["values"][name])
        saved, world_size = after, now
    for earlier, later in pairwise(losses):
        assert max(later) < max(earlier[5:])  # no bump: all losses are below the worst of the last five


def as_torchrun(monkeypatch):
    """Clients ask the environment which rank they are, and of how many."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    others = {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for key, value in (ranks | others).items():
        monkeypatch.setenv(key, str(value))


@process_ranks(2)
def test_accelerate(monkeypatch):
    pytest.importorskip("accelerate")
    as_torchrun(monkeypatch)
    model, handle, losses = example("accelerate_ddp").train()
    assert losses[-1] < 0.9 * losses[0]
    assert handle.stats().steps == 8 and handle.stats().ratio < 0.2  # 16 batches of each rank, two to a step
    assert same_on_all_ranks(vector(model.parameters()))


@process_ranks(2)
def test_lightning(monkeypatch):
    pytest.importorskip("lightning")
    as_torchrun(monkeypatch)
    model, handle = example("lightning_ddp").train()
    assert sum(model.losses[-4:]) < 0.9 * sum(model.losses[:4])
    assert handle.stats().steps == 16 and handle.stats().ratio < 0.2
    assert same_on_all_ranks(nn.utils.parameters_to_vector(model.parameters()).detach())
