"""Schedule auto of sharded training: FSDP2's own collectives where encoding does not pay, and the log says so once."""

import logging

import torch.distributed as dist

import commq
from commq.attach import fsdp_gather, fsdp_scatter
from commq.collectives import link
from commq.collectives.memory import memory_of
from fsdp_cases import Even, Net, grid, line, made, run, same_bits, shard, train
from harness import process_ranks


@process_ranks(2, 3)
def test_what_does_not_pay_has_the_bits_of_fsdp2_and_no_residual(monkeypatch):
    for module in (fsdp_gather, fsdp_scatter):
        monkeypatch.setattr(module, "pays", lambda *_, **__: False)
    for make in (Net, Even):
        plain = run(None, make)
        for name in ("full-shard", "sdp4bit", "loco", "int4"):
            found = run(commq.recipe(name, schedule="auto"), make)
            same_bits(plain, found)
            stats = found.handle.stats()
            assert stats.residual_norm == 0 and stats.sent_bytes > 0


@process_ranks(2)
def test_what_pays_has_the_bits_of_the_same_recipe_in_a_flat_exchange(monkeypatch):
    for module in (fsdp_gather, fsdp_scatter):
        monkeypatch.setattr(module, "pays", lambda *_, **__: True)
    for name in ("full-shard", "sdp4bit", "loco", "bf16"):
        auto, flat = (run(commq.recipe(name, schedule=schedule), Even) for schedule in ("auto", "two_hop"))
        same_bits(flat, auto)
        assert auto.handle.stats() == flat.handle.stats()


@process_ranks(4)
def test_hsdp_leaves_what_stays_inside_a_host_to_fsdp2_and_encodes_the_rest(monkeypatch):
    for module in (fsdp_gather, fsdp_scatter):
        monkeypatch.setattr(module, "pays", lambda *_, **__: False)
    exempt = commq.Exempt(format=commq.get_format("fp32"))
    auto = run(commq.recipe("hybrid-shard", schedule="auto", exempt=exempt), Net, mesh=grid(2))
    inside = run(commq.recipe("hybrid-shard", schedule="two_hop", inside="fp32", exempt=exempt), Net, mesh=grid(2))
    same_bits(inside, auto)
    assert auto.handle.stats() == inside.handle.stats() and auto.handle.stats().residual_norm > 0


class Said(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


@process_ranks(2)
def test_all_ranks_try_both_ways_once_and_the_log_says_so_once(monkeypatch):
    said = Said()
    logger = logging.getLogger("commq")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    times = iter([8, 10, 10, 8])  # gathers: encoded, plain; then scatters
    monkeypatch.setattr(link, "time_call", lambda call, device: (call(), next(times))[1])
    mesh = line()
    model = shard(made(Even), commq.recipe("full-shard", schedule="auto"), blocks=False, mesh=mesh)
    first = train(model, steps=1)
    train(model, steps=2, first=1, optimizer=first.optimizer)
    decided = {k[1]: v for k, v in memory_of(mesh.get_group()).facts.items() if k[0] == "pays"}
    assert decided == {"gather": True, "scatter": False}
    if dist.get_rank():
        assert not said.lines
    else:
        (gather_level, gathers), (scatter_level, scatters) = said.lines
        assert gather_level == "INFO" and "chose flat with int8" in gathers and "all-gathers" in gathers
        assert scatter_level == "WARNING" and "chose plain for reduce-scatters" in scatters and "int4" in scatters
