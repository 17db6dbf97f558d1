"""Precision schedules, loss spikes, and the control that follows both."""

import math

import pytest
import torch

from commq.lowp import convert, policy
from commq.lowp.control import Control
from commq.lowp.schedule import Schedule, schedule
from commq.lowp.spike import ENOUGH, MEMORY, SpikeDetector


def names(found: Schedule, steps: int) -> list[str]:
    return [found.at(step).name for step in range(1, steps + 1)]


def test_stages_begin_at_steps_and_fractions():
    assert names(schedule("", "int8", 4), 4) == ["int8"] * 4
    assert names(schedule("3=int8,0.8=bf16", "int4", 10), 10) == ["int4"] * 3 + ["int8"] * 5 + ["bf16"] * 2
    tpt = names(schedule("", "fp4-tpt", 100), 100)
    assert tpt == ["fp4-tpt"] * 92 + ["bf16"] * 8
    assert names(schedule("", "fp4-tpt", 3), 3) == ["fp4-tpt"] * 3  # 2.76 rounds to the end
    assert names(schedule("0.1=bf16", "int8", 3), 3) == ["bf16"] * 3


def test_cycles_follow_the_cosine():
    found = schedule("cyclic=int4,int8,bf16:2", "int4", 40)
    levels = ["int4", "int8", "bf16"]
    for step, name in enumerate(names(found, 40)):
        t = step % 20
        assert levels.index(name) == round(0.5 * 2 * (1 - math.cos(math.pi * t / 20)))
    assert set(names(found, 40)) == set(levels)
    assert names(found, 20) == names(found, 40)[20:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16", "expected step=precision"),
        ("5=", "expected step=precision"),
        ("x=bf16", "expected step=precision"),
        ("inf=bf16", "expected step=precision"),
        ("1.5=bf16", "not between 0 and 1"),
        ("10=bf16", "never holds"),
        ("0.5=bf17", "'bf17' is unknown"),
        ("0.5=bf16,0.2=int8", "ascending"),
        ("cyclic=int4,int8", "number of cycles"),
        ("cyclic=int8:3", "at least 2 levels"),
        ("cyclic=int4,bf16:2", "int8 is none of its levels"),
        ("cyclic=int4,int8:11", "at least 2 levels, and from 1 cycle"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        schedule(text, "int8", 10)


def test_spikes():
    detector = SpikeDetector(deviations=6.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator).tolist()
    falling = [3.0 - 0.005 * n + 0.05 * noise[n] for n in range(300)]
    assert not any(detector.observe(loss) for loss in falling)
    before = detector.state_dict()
    assert detector.observe(4.0) and detector.observe(float("nan")) and detector.observe(float("inf"))
    assert {**detector.state_dict(), "row": 0} == before
    assert not detector.observe(1.5)
    again = SpikeDetector()
    again.load_state_dict(detector.state_dict())
    rest = [1.5, 9.0, 1.49, 5.0] + [8.0] * MEMORY + [8.0] * ENOUGH + [8.1]
    found = [detector.observe(loss) for loss in rest]
    assert found == [again.observe(loss) for loss in rest]
    assert found[:4] == [False, True, False, True]
    assert all(found[4 : 3 + MEMORY]) and not any(found[5 + MEMORY :])  # a new level is no spike
    assert not SpikeDetector().observe(1e30) and SpikeDetector().observe(float("nan"))


def blocks() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.ModuleDict({"mlp": torch.nn.Linear(32, 32)}) for _ in range(2)]
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(layers), "head": torch.nn.Linear(32, 8)})


def test_control_falls_back_and_comes_back():
    def make() -> Control:
        return Control(
            convert(blocks(), "int8"), schedule("8=fp8", "int8", 20), fallback=policy("bf16"), fallback_steps=3
        )

    control, trace = make(), []
    for step in range(1, 13):
        trace.append(control.begin(step).name)
        assert control.conversion.policy.name == trace[-1]
        if step == 6:
            assert control.spike(step)
        if step == 7:
            resumed = make()
            resumed.load_state_dict(control.state_dict())
    assert trace == ["int8"] * 6 + ["bf16"] * 3 + ["fp8"] * 3
    assert [resumed.begin(step).name for step in range(8, 13)] == trace[7:]
    plain = Control(convert(blocks(), "int8"), schedule("", "int8", 20))
    assert not plain.spike(3) and plain.begin(4).name == "int8"


def test_a_policy_of_the_schedule_that_fits_no_layer_is_refused_at_the_start():
    wrong = policy({"default": "int8", "rules": {"attention": "fp8"}})
    with pytest.raises(ValueError, match="matches no linear layer"):
        Control(convert(blocks(), "int8"), schedule("", "int8", 20), fallback=wrong)
