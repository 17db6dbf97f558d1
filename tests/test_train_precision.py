"""Runs with everything in low precision: resumed bit for bit, guarded, traced, configured by a file, reported."""

import json
import math
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import commq
from commq.train.checkpoint import latest_checkpoint, load_common, load_own
from commq.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, OutputConfig
from commq.train.config_file import config_text, expand
from commq.train.config_numerics import GuardConfig, PrecisionConfig
from commq.train.data import load_corpus
from commq.train.metrics import read_events, read_rows, read_statistics
from commq.train.ranks import Ranks
from commq.train.report import write_report
from commq.train.run import Run
from commq.train.trace import trace
from commq.train.trainer import Trainer
from harness import process_ranks, run_processes
from test_train_run import digest

MODEL = ModelConfig(layers=2, dim=64, heads=2, context=16)


def config(out: Path, *, parallel: str = "ddp", recipe: str = "int4", steps: int = 6, **groups: object) -> Config:
    chosen = {
        "optimizer": OptimizerConfig(optimizer="adamw8bit", warmup=2),
        "lowp": PrecisionConfig(precision="fp8", schedule="3=mxfp4,0.8=bf16", monitor_every=2),
        "guard": GuardConfig(guard="rollback", snapshot_every=2),
    } | groups
    output = OutputConfig(
        out=out,
        log_every=1,
        val_every=3,
        checkpoint_every=2,
        keep=3,
        tensorboard=False,
        resume=bool(groups.get("resume")),
    )
    chosen.pop("resume", None)
    return Config(
        recipe=recipe,
        parallel=parallel,
        steps=steps,
        model=MODEL,
        data=DataConfig(batch=2, accumulate=2, max_mb=0.1, val_sequences=8),
        output=output,
        **chosen,
    )


def this_rank() -> Ranks:
    assert dist.group.WORLD is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD, 1)


def rows(out: Path) -> list[tuple]:
    return [astuple(replace(row, seconds=0.0, sent_bytes=0, raw_bytes=0)) for row in read_rows(out)]


def uncounted(state: dict) -> dict:
    """A checkpoint without its time and its count of bytes."""
    state.pop("seconds", None)

    def strip(part: object) -> object:
        if isinstance(part, dict):
            return {key: strip(value) for key, value in part.items() if "bytes" not in str(key)}
        return part

    return strip(state)  # type: ignore[return-value]


def everything_resumes(out: Path) -> None:
    """Stopped before (after 2 steps, ddp) and after (4, fsdp) the precision changes."""
    for parallel, optimizer in (("ddp", "adamw8bit"), ("fsdp", "adamw8bit")):
        where = out / f"{parallel}-{optimizer}"
        chosen = {"parallel": parallel, "optimizer": OptimizerConfig(optimizer=optimizer, warmup=2, bf16_weights=True)}
        if parallel == "fsdp":
            chosen["optimizer"] = OptimizerConfig(optimizer=optimizer, warmup=2, update_clipping=True)
            chosen["guard"] = GuardConfig(guard="rollback", snapshot_every=2, loss_scale="dynamic")
        Run(config(where, **chosen), this_rank()).execute()
        whole, folder = rows(where), where / "checkpoints"
        newest = latest_checkpoint(folder)
        states = uncounted(load_common(newest)), uncounted(load_own(newest, dist.get_rank()))
        for stop in (2,) if parallel == "ddp" else (4,):
            dist.barrier()
            if dist.get_rank() == 0:
                for path in folder.glob("step-*"):
                    if int(path.name[-8:]) > stop:
                        path.rename(folder / f".{path.name}")
            dist.barrier()
            run = Run(config(where, resume=True, **chosen), this_rank())
            assert run.trainer.step == stop
            run.execute()
            assert rows(where) == whole
            again = uncounted(load_common(newest)), uncounted(load_own(newest, dist.get_rank()))
            for one, two in zip(states, again, strict=True):
                assert digest(one) == digest(two), (parallel, stop)
        measured = read_statistics(where)
        assert [step for step, _ in measured] == [2, 4]  # bf16 in step 6
        assert all(each.overflow == 0.0 and each.sqnr > 5.0 for _, found in measured for each in found)


def test_a_run_with_everything_on_resumes_bit_for_bit(tmp_path):
    run_processes(everything_resumes, 2, args=(tmp_path,), timeout=120)


def kept_state(settings: Config, executes: bool) -> str:
    """Digest of weights and optimizer state as they are saved, or as they are after loading them on other ranks."""
    run = Run(settings, this_rank())
    if executes:
        run.execute()
    state = run.trainer.common_state()
    return digest([state["model"], state["optimizer"]])


def test_codes_are_sharded_anew_on_other_ranks(tmp_path):
    chosen = {"parallel": "fsdp", "optimizer": OptimizerConfig(optimizer="adamw4bit", warmup=2), "steps": 2}
    chosen |= {"lowp": PrecisionConfig(precision="int8"), "guard": GuardConfig()}
    before = run_processes(kept_state, 2, args=(config(tmp_path, **chosen), True))
    reshard = config(tmp_path, resume=True, **chosen)
    reshard = replace(reshard, output=replace(reshard.output, reshard=True))
    after = run_processes(kept_state, 3, args=(reshard, False))
    assert before[0] == after[0]


ROLLBACK = GuardConfig(guard="rollback", snapshot_every=10, loss_scale="dynamic")


class Spoiled(Trainer):
    """Rank 1's losses in some steps are multiplied by something."""

    spoil: dict[int, float] = {}  # noqa: RUF012

    def _loss(self, model, sequences):
        loss = super()._loss(model, sequences)
        validates = not torch.is_grad_enabled()
        return loss if validates or dist.get_rank() == 0 else loss * self.spoil.get(self.step, 1.0)


def spoiled(out: Path, spoil: dict[int, float], guard: GuardConfig, steps: int, fallback: str = "bf16") -> Spoiled:
    lowp = PrecisionConfig(precision="int8", fallback=fallback, fallback_steps=3)
    settings = config(out, steps=steps, lowp=lowp, guard=guard)
    small, data = replace(MODEL, layers=1), replace(settings.data, accumulate=1)
    settings = replace(settings, model=small, data=data)
    corpus = load_corpus(None, max_mb=0.1, context=MODEL.context)
    trainer = Spoiled(settings, commq.recipe("int4"), corpus, this_rank())
    trainer.spoil = spoil
    return trainer


@process_ranks(1)
def test_layers_that_were_replaced_after_conversion_are_refused(tmp_path):
    class Replaced(Trainer):
        def _attach(self, model, recipe):
            model.blocks[1].mlp = torch.nn.Identity()
            return super()._attach(model, recipe)

    corpus = load_corpus(None, max_mb=0.1, context=MODEL.context)
    with pytest.raises(ValueError, match=r"layer blocks\.1\.mlp\.0 is shared out or replaced"):
        Replaced(config(tmp_path), commq.recipe("int4"), corpus, this_rank())


@process_ranks(2)
def test_a_spike_is_rolled_back_on_every_rank(tmp_path):
    trainer = spoiled(tmp_path, {24: 100.0, 26: math.nan, 31: 100.0, 33: 100.0}, ROLLBACK, steps=40)
    states, names = {}, {}
    for step in range(1, 34):
        trainer.train_step()
        names[step] = trainer.control.conversion.policy.name
        states[step] = digest(trainer.ddp.module.state_dict())
    # The state after step 30 never counts as good: the next loss is a spike.
    assert {states[step] for step in (24, 26, 31, 33)} == {states[20]}
    assert len({states[step] for step in states}) == 29
    assert [step for step, name in names.items() if name == "bf16"] == [25, 26, 27, 28, 29, 32, 33]
    everyone = [None, None]
    dist.all_gather_object(everyone, (states[33], trainer.guard.events))
    assert everyone[0] == everyone[1]
    first, second, _, last = trainer.guard.events
    assert "step 33: loss" in last and "back to the state after step 20" in last
    assert "step 24: loss" in first and "back to the state after step 20; bf16 until step 27" in first
    assert "step 26: loss nan; " in second and "it did not come back" not in second
    assert all(p.isfinite().all() for p in trainer.ddp.parameters())


@process_ranks(2)
def test_watching_names_the_origin_and_lets_spikes_pass(tmp_path):
    trainer = spoiled(tmp_path, {24: 100.0}, GuardConfig(guard="watch"), steps=40)
    while trainer.step < 25:
        trainer.train_step()
    assert len(trainer.guard.events) == 1 and "is a spike; bf16 until step 27" in trainer.guard.events[0]
    with torch.no_grad():
        trainer.ddp.module.blocks[0].mlp[0].weight[3, 5] = math.inf
    with pytest.raises(FloatingPointError, match=r"rank 0: weight module\.blocks\.0\.mlp\.0\.weight is not finite"):
        trainer.train_step()
    with pytest.raises(FloatingPointError, match="there is no good state yet"):
        spoiled(tmp_path, {1: math.inf}, GuardConfig(guard="rollback"), steps=40).train_step()


@process_ranks(2)
def test_a_shard_of_one_rank_that_is_not_finite_is_named_by_all(tmp_path):
    settings = config(tmp_path, parallel="fsdp", recipe="full-shard", guard=GuardConfig(guard="watch"))
    trainer = Run(settings, this_rank()).trainer
    if dist.get_rank() == 1:
        with torch.no_grad():
            trainer.ddp.module.blocks[0].mlp[0].weight._local_tensor[3, 5] = math.inf
    with pytest.raises(FloatingPointError, match=r"rank 1: weight blocks\.0\.mlp\.0\.weight is not finite"):
        trainer.train_step()


@process_ranks(1)
def test_the_first_module_that_is_not_finite_is_named():
    class Root(torch.nn.Module):
        def forward(self, x):
            return x.sqrt()

    def names(model, x):
        return trace(model, lambda: model(x).sum().backward())

    forward = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(Root(), torch.nn.Tanh()))
    assert names(forward, torch.randn(8, 4)) == "output of 1.0 is not finite, from finite inputs"
    backward = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), Root())  # of 0: derivative infinite
    with torch.no_grad():
        backward[0].bias.fill_(-100.0)
    assert names(backward, torch.randn(8, 4)) == "input gradient of 2 is not finite, from finite inputs"
    assert names(torch.nn.Linear(4, 4), torch.randn(8, 4)) == "it did not come back when the pass was repeated"


@process_ranks(2)
def test_overflowing_gradients_are_skipped_and_the_loss_scale_halved(tmp_path):
    for parallel in ("ddp", "fsdp"):
        guard = GuardConfig(loss_scale="dynamic")
        lowp = PrecisionConfig(precision="fp8")
        settings = config(tmp_path / parallel, parallel=parallel, guard=guard, lowp=lowp, steps=2)
        run = Run(settings, this_rank())
        run.trainer.scaler._init_scale = 2.0**127  # overflows
        run.execute()
        logged = read_rows(tmp_path / parallel)
        assert not math.isfinite(logged[0].grad_norm) and math.isfinite(logged[0].train_loss)
        assert run.trainer.scaler.get_scale() < 2.0**127
        assert all(p.isfinite().all() for p in run.trainer.ddp.module.state_dict().values())


def test_a_file_says_the_same_as_the_command_line(tmp_path):
    (tmp_path / "a.toml").write_text(
        'recipe = "int8"\nno-tensorboard = true\nbf16-weights = true\n'
        "[model]\nlayers = 5\ndim = 64\n[output]\nval_every = 7\n"
    )
    (tmp_path / "b.yaml").write_text("layers: 6\nlr: 0.001\nresume: false\n")
    found = expand(
        ["--config", str(tmp_path / "a.toml"), "--dim", "32", f"--config={tmp_path / 'b.yaml'}", "--tensorboard"]
    )
    assert found == [
        *("--recipe", "int8", "--bf16-weights", "--layers", "5", "--val-every", "7"),
        *("--layers", "6", "--lr", "0.001", "--no-resume", "--dim", "32", "--tensorboard"),
    ]  # fmt: skip
    for text, message in (
        ("presicion = 'fp8'", "'presicion' is no option; did you mean precision"),
        ("lr = [1, 2]", "lr is a list"),
        ("lr = ", "Invalid value"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            expand(["--config", str(tmp_path / "c.toml")])
    with pytest.raises(ValueError, match="expected a TOML or YAML file after it"):
        expand(["--config"])


def test_the_saved_configuration_is_the_configuration(tmp_path):
    import tyro

    chosen = config(tmp_path, optimizer=OptimizerConfig(optimizer="adamw4bit", bf16_weights=True, lr=1e-3))
    (tmp_path / "config.toml").write_text(config_text(chosen))
    found = tyro.cli(
        Config, args=expand(["--config", str(tmp_path / "config.toml")]), config=(tyro.conf.OmitArgPrefixes,)
    )
    assert found == chosen


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"lowp": PrecisionConfig(precision="fp8", fallback="bf16"), "guard": GuardConfig()}, "--guard watch"),
        ({"optimizer": OptimizerConfig(optimizer="birder")}, "neither with --loss-scale nor with --guard rollback"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, groups, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **groups)
    with pytest.raises(ValueError, match="choose a --precision"):
        PrecisionConfig(schedule="0.5=bf16")
    with pytest.raises(ValueError, match="found --optimizer adamw"):
        OptimizerConfig(update_clipping=True)


@process_ranks(1)
def test_wrong_precisions_are_refused_and_the_report_has_what_it_says(tmp_path):
    for precision, message in (("fp9", "'fp9' is unknown"), (str(tmp_path / "none.toml"), "No such file")):
        with pytest.raises(ValueError, match=message):
            Run(config(tmp_path / "wrong", lowp=PrecisionConfig(precision=precision)), this_rank())
    (tmp_path / "policy.toml").write_text('default = "int8"\nlast = 1\n[rules]\n"attention" = "bf16"\n')
    lowp = PrecisionConfig(precision=str(tmp_path / "policy.toml"), schedule="0.5=fp8", monitor_every=2)
    run = Run(config(tmp_path / "run", lowp=lowp), this_rank())
    run.trainer.guard.events.append("step 0: nothing")
    run.execute()
    text = write_report(run).read_text()
    for part in (
        "| adamw8bit |",
        "custom after 0, fp8 after 3",
        "## Layers in step 6",
        "- step 0: nothing",
        "lr = 0.002",
    ):
        assert part in text, part
    assert (tmp_path / "run" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert read_events(tmp_path / "run") == ["step 0: nothing"]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["precision"].endswith("policy.toml") and '"last": 1' in saved["resolved precision"]


@process_ranks(2)
def test_a_snapshot_of_sharded_parameters_is_restored_to_the_bit(tmp_path):
    for recipe, optimizer in (("sdp4bit", "adamw4bit"), ("loco", "adamw")):
        chosen = {"parallel": "fsdp", "recipe": recipe, "optimizer": OptimizerConfig(optimizer=optimizer, warmup=2)}
        chosen["guard"] = GuardConfig(guard="rollback", snapshot_every=25)
        trainer = Run(config(tmp_path / recipe, **chosen), this_rank()).trainer
        trainer.train_step()
        trainer.guard.keep()
        before = shards(trainer)
        losses = [[trainer.train_step()[0].item() for _ in range(2)]]
        assert shards(trainer) != before
        trainer.guard._good.restore(trainer.ddp, trainer.optimizer, trainer.handle)
        trainer.step = 1
        assert shards(trainer) == before
        losses.append([trainer.train_step()[0].item() for _ in range(2)])
        assert recipe == "sdp4bit" or losses[0] == losses[1]  # differences begin with weights sent as they are


def shards(trainer: Trainer) -> str:
    """Digest of this rank's weights and optimizer state."""
    states = [list(state.values()) for state in trainer.optimizer.state.values()]
    tensors = [*trainer.ddp.parameters(), *(t for state in states for t in state)]
    return digest([t.detach()._local_tensor if hasattr(t, "_local_tensor") else t.detach() for t in tensors])
