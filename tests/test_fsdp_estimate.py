"""estimate_memory of sharded training against what commq really holds and borrows."""

import pytest
import torch

import commq
from commq.attach import fsdp_estimate
from commq.collectives.memory import Memory, memory_of
from fsdp_cases import Even, Net, grid, line, made, run
from harness import thread_ranks


class Watched(Memory):
    """Counts the bytes that are lent."""

    def watch(self):
        self.lent = self.most = 0
        self.__class__ = Watched

    def take(self, rows, nbytes, device):
        self.lent += rows * nbytes
        self.most = max(self.most, self.lent)
        return super().take(rows, nbytes, device)

    def give(self, *buffers):
        self.lent -= sum(buffer.numel() for buffer in buffers)
        super().give(*buffers)


def held(handle):
    """Residuals, second residuals, references."""
    residual = second = reference = 0
    for each in handle.units.values():
        stored = [s for s in (each.scatter._route.residuals if each.scatter._route else []) if s]
        stored += [s for s in (each.between._route[3] if each.between else []) if s]
        residual += sum(s.values.nbytes + (s.scales.nbytes if s.scales is not None else 0) for s in stored)
        second += sum(s.values.nbytes for s in (each.scatter._route.second if each.scatter._route else []) if s)
        if each.gather.tracker is not None:
            reference += each.gather.tracker.rows.nbytes + each.gather.tracker.own.nbytes
    return residual, second, reference


@thread_ranks(4)
def test_it_says_what_is_held_and_lent(monkeypatch):
    monkeypatch.setattr(fsdp_estimate, "_copies", lambda *_: 0)  # of lanes: torch's allocator lends them
    both = {"feedback": "classic", "answer_feedback": {"rule": "classic", "storage": "fp32"}}
    recipes = ["full-shard", "sdp4bit", "loco", "qsdp", commq.recipe("int4", schedule="two_hop", **both)]
    for make in (Net, Even):
        for hosts in (None, (0, 0, 1, 1)):
            for recipe in recipes:
                mesh = line(hosts)
                memory = memory_of(mesh.get_group())
                Watched.watch(memory)
                found = run(recipe, make, mesh=mesh, steps=2)
                model = made(make).to("meta")  # the transport of threads needs no copies, as NCCL
                estimate = commq.estimate_memory(
                    model, recipe, 4, units=list(model.blocks), hosts=len(set(hosts or [0]))
                )
                kept = (estimate.residual, estimate.answer_residual, estimate.reference)
                assert kept == held(found.handle), recipe
                assert memory.lent == 0
                assert memory.most == estimate.wire
    found = run("hybrid-shard", Net, mesh=grid(2), steps=1)
    model = made(Net)
    estimate = commq.estimate_memory(model, "hybrid-shard", 2, units=list(model.blocks), replicas=2)
    assert (estimate.residual, 0, 0) == held(found.handle)


def test_a_model_without_memory():
    with torch.device("meta"):
        model = Net(1024, 24)
    four = commq.estimate_memory(model, "full-shard", 4, units=list(model.blocks), param_dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    assert four.residual == four.reference == 0 and four.wire < 2 * parameters
    kept = commq.estimate_memory(model, "sdp4bit", 4, units=list(model.blocks), param_dtype=torch.bfloat16)
    assert 2.5 * parameters <= kept.reference < 2.51 * parameters
    with pytest.raises(ValueError, match="sharded training has no buckets"):
        commq.estimate_memory(model, "sdp4bit", 4, units=(), bucket_cap_mb=25)
    with pytest.raises(ValueError, match="pass units"):
        commq.estimate_memory(model, "int4", 4, replicas=2)
