"""Runs of the trainer with the optimizers that decide what travels: same bits, checkpoints in every phase, refusals."""

import dataclasses

import pytest
import torch.distributed as dist

import commq
from commq.train.checkpoint import latest_checkpoint, load_common, load_own
from commq.train.config import OptimizerConfig
from commq.train.data import load_corpus
from commq.train.metrics import read_rows
from commq.train.run import Run
from commq.train.trainer import Trainer
from harness import process_ranks, run_processes
from test_train_run import TINY, config, digest, gathered, residual_sum, this_rank

KINDS = ["onebit-adam", "onebit-lamb", "zero-one-adam", "birder", "ef-signsgd", "signsgd-mv"]


def settings(out, kind, *, steps=26, **output):
    """Freezes after 2 steps; zero-one-adam is in a long local interval after 7, and meets again before the end."""
    optimizer = OptimizerConfig(optimizer=kind, warmup=2, freeze_step=2, lr=1e-3)
    return dataclasses.replace(config(out, steps=steps, **output), optimizer=optimizer)


@process_ranks(2)
def test_ranks_and_a_second_run_have_the_same_bits(tmp_path):
    corpus = load_corpus(None, max_mb=0.1, context=TINY.context)
    for kind in KINDS:
        chosen = settings(tmp_path, kind)
        first, second = (Trainer(chosen, commq.recipe("int4"), corpus, this_rank()) for _ in range(2))
        apart = 0
        for _ in range(7):
            assert first.train_step()[0].item() == second.train_step()[0].item()
            states = gathered(digest(first.common_state()))
            assert (states[0] == states[1]) == first.synchronized, kind
            assert digest(second.common_state()) == states[dist.get_rank()]
            apart += not first.synchronized
        assert (apart > 0) == (kind == "zero-one-adam")
        assert first.validate() == second.validate()


@process_ranks(2)
def test_what_is_no_gradient_is_not_clipped(tmp_path):
    """Birder's answers are up to 1 whatever the gradients are; OneBitAdam's momenta are clipped."""
    corpus = load_corpus(None, max_mb=0.1, context=TINY.context)
    for kind, differ in (("birder", False), ("onebit-adam", True)):
        chosen = settings(tmp_path, kind)
        trainers = [
            Trainer(
                dataclasses.replace(chosen, optimizer=dataclasses.replace(chosen.optimizer, clip=clip)),
                commq.recipe("int4"),
                corpus,
                this_rank(),
            )
            for clip in (0.0, 1e-3)
        ]
        for _ in range(2):
            states = [(trainer.train_step(), digest(trainer.common_state()["model"]))[1] for trainer in trainers]
        assert (states[0] != states[1]) == differ, kind


def uncounted(state):
    """A checkpoint without time and bytes: DDP lays out its buckets anew after a start, and owners swap residuals."""
    state.pop("seconds", None)
    if "handle" in state:
        state["handle"]["coded"].pop("sent_bytes")
    return state


@process_ranks(2)
def test_a_checkpoint_in_any_phase_restores_every_bit(tmp_path):
    """Saved after steps 2 and 7: where the variance freezes, and (zero-one-adam) in the middle of a local interval."""
    for kind in ("onebit-adam", "zero-one-adam", "birder"):
        Run(settings(tmp_path / kind, kind, keep=20), this_rank()).execute()
        folder = tmp_path / kind / "checkpoints"
        for stop in (2, 7):
            part = tmp_path / f"{kind}-{stop}"
            run = Run(settings(part, kind, keep=20), this_rank())
            while run.trainer.step < stop:
                run.trainer.train_step()
            assert run.trainer.synchronized == (kind != "zero-one-adam" or stop == 2)
            run._save(0.0)
            resumed = Run(settings(part, kind, keep=20, resume=True), this_rank())
            assert resumed.trainer.step == stop
            resumed.execute()
            for load in (load_common, lambda path: load_own(path, dist.get_rank())):
                one, two = (uncounted(load(latest_checkpoint(each))) for each in (folder, part / "checkpoints"))
                assert digest(one) == digest(two), (kind, stop)
            whole, rest = (
                [(row.step, row.train_loss, row.val_loss, row.grad_norm) for row in read_rows(out)]
                for out in (tmp_path / kind, part)
            )
            assert whole[stop:] == rest, kind


def test_at_another_number_of_ranks_the_residuals_keep_their_sum(tmp_path):
    before = run_processes(residual_sum, 2, args=(settings(tmp_path, "onebit-adam", steps=6), True))
    reshard = settings(tmp_path, "onebit-adam", steps=6, resume=True, reshard=True)
    after = run_processes(residual_sum, 3, args=(reshard, False))
    for name, total in before[0].items():
        assert total.any() and (after[0][name] == total).all(), name


def test_ranks_that_have_not_met_cannot_become_more(tmp_path):
    run_processes(stop_apart, 2, args=(settings(tmp_path, "zero-one-adam"),))
    run_processes(refuses_reshard, 1, args=(settings(tmp_path, "zero-one-adam", resume=True, reshard=True),))


def stop_apart(chosen):
    run = Run(chosen, this_rank())
    while run.trainer.step < 7:
        run.trainer.train_step()
    run._save(0.0)


def refuses_reshard(chosen):
    with pytest.raises(ValueError, match="between two meetings"):
        Run(chosen, this_rank())
