"""commq.PipelineStage under torch's schedules: same bits with fp32, else within the bound; what goes wrong is said."""

import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

import commq
from commq.attach.crossing import Place, Samples, Turn
from commq.codecs.bounds import error_bound
from commq.collectives import roll_call
from commq.collectives.memory import Memory
from harness import RankError, process_ranks, run_processes

CPU = torch.device("cpu")
CHUNKS, ROWS, WIDTH = 4, 2, 37
SCHEDULES = [(ScheduleGPipe, 1), (Schedule1F1B, 1), (ScheduleInterleaved1F1B, 2)]


class Scale(nn.Module):
    """y = w * x, element by element, so that errors add up in a way that can be computed. Remembers what it saw."""

    def __init__(self, number):
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.inputs, self.outputs, self.received = [], [], []

    def forward(self, x):
        y = x * self.weight
        self.inputs.append(x.detach().clone())
        self.outputs.append(y.detach().clone())
        if y.requires_grad:
            y.register_hook(lambda gradient: self.received.append(gradient.clone()))
        return y


def batch():
    generator = torch.Generator().manual_seed(99)
    return torch.randn(2, CHUNKS * ROWS, 3, WIDTH, generator=generator)


def train(schedule, make, *, per_rank=1, steps=1, ids=None, module=Scale):
    """The stages of this rank after some steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers = [rank + world_size * each for each in range(per_rank)]
    stages = [make(module(number), number, world_size * per_rank) for number in numbers]
    runs = schedule(
        stages if per_rank > 1 else stages[0],
        n_microbatches=CHUNKS,
        loss_fn=lambda y, target: (y * target).sum(),
        scale_grads=False,
    )
    x, target = batch()
    for _ in range(steps):
        for stage in stages:
            stage.submod.zero_grad()
            for seen in (stage.submod.inputs, stage.submod.outputs, stage.submod.received):
                seen.clear()
            if ids is not None:
                stage.set_samples(ids)
        runs.step(*([x] if rank == 0 else []), **({"target": target} if rank == world_size - 1 else {}))
    return stages


def plain(module, number, count):
    return pipelining.PipelineStage(module, number, count, CPU)


def encoded(forward, backward, **options):
    def make(module, number, count):
        return commq.PipelineStage(module, number, count, CPU, forward=forward, backward=backward, **options)

    return make


def everyone(stages):
    """What the modules of all stages saw, by number: (inputs, outputs, received gradients, weight, its gradient)."""
    own = {}
    for stage in stages:
        module = stage.submod
        seen = [torch.stack(each[-CHUNKS:]) for each in (module.inputs, module.outputs, module.received)]
        own[stage.stage_index] = [*seen, module.weight.detach(), module.weight.grad]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return {number: seen for theirs in found for number, seen in theirs.items()}


@process_ranks(2, 3, 4)
def test_gradients_and_bytes_under_every_schedule():
    tensor = ROWS * 3 * WIDTH
    for schedule, per_rank in SCHEDULES if dist.get_world_size() == 3 else SCHEDULES[1:]:
        expected = train(schedule, plain, per_rank=per_rank)
        for ahead in (0, 1, 3):
            same = train(schedule, encoded("fp32", "fp32", ahead=ahead), per_rank=per_rank)
            for one, other in zip(expected, same, strict=True):
                assert torch.equal(one.submod.weight.grad, other.submod.weight.grad)
        exact = everyone(expected)

        stages = train(schedule, encoded("int4", "int8"), per_rank=per_rank)
        check_errors(exact, everyone(stages), "int4", "int8")
        for stage in stages:
            nbytes = {name: commq.encode(torch.empty(tensor), name).layout.nbytes for name in ("int4", "int8")}
            sent = nbytes["int4"] * (not stage.is_last) + nbytes["int8"] * (not stage.is_first)
            received = nbytes["int4"] * (not stage.is_first) + nbytes["int8"] * (not stage.is_last)
            assert (stage.sent_bytes, stage.received_bytes) == (CHUNKS * sent, CHUNKS * received)
            assert stage.raw_bytes == CHUNKS * 4 * tensor * ((not stage.is_first) + (not stage.is_last))


def check_errors(exact, found, forward, backward):
    """Errors of the boundaries, carried from stage to stage, bound those of activations, gradients and weights."""

    def bound(sent, name):
        each = [error_bound(tensor.reshape(-1), commq.get_format(name)).view(tensor.shape) for tensor in sent]
        return torch.stack(each) + sent.abs() * 2.0**-20

    last = max(exact)
    in_error, out_error = {0: torch.zeros(())}, {last: torch.zeros(())}
    for number in range(last):
        carried = in_error[number] * exact[number][3].abs()
        in_error[number + 1] = carried + bound(found[number][1], forward)
    for number in range(last, 0, -1):
        weight = exact[number][3]
        out_error[number - 1] = out_error[number] * weight.abs() + bound(found[number][2] * weight, backward)
    for number, (inputs, _, received, _, gradient) in found.items():
        x, _, g, _, expected = exact[number]
        if number:
            assert bool(((inputs - x).abs() <= in_error[number]).all())
            assert not torch.equal(inputs, x)
        if number < last:
            assert bool(((received - g).abs() <= out_error[number]).all())
        allowed = in_error[number] * received.abs() + x.abs() * out_error[number] + (x * g).abs() * 2.0**-18
        assert bool(((gradient - expected).abs() <= allowed.sum(dim=(0, 1, 2))).all())


@process_ranks(3)
def test_ways_are_deterministic_and_differences_settle():
    stochastic = commq.Direct(commq.get_format("int4"), rounding="stochastic", rotation=commq.Rotation(signs=True))
    ids = torch.arange(CHUNKS * ROWS).flip(0)
    for forward, names in (
        (stochastic, None),
        (commq.Tiles(), None),
        (commq.Differences(samples=CHUNKS * ROWS), ids),
    ):
        runs = [
            everyone(train(Schedule1F1B, encoded(forward, "int8", seed=3), steps=3, ids=names)) for _ in range(2)
        ]  # fmt: skip
        for number, seen in runs[0].items():
            assert all(torch.equal(one, other) for one, other in zip(seen, runs[1][number], strict=True))
    # The activations stay as they are, so what is left of the differences shrinks from step to step.
    exact = everyone(train(Schedule1F1B, plain))
    lost = [
        float((everyone(train(Schedule1F1B, encoded(way, "int8"), steps=3, ids=names))[2][0] - exact[2][0]).norm())
        for way, names in (("int4", None), (commq.Differences(samples=CHUNKS * ROWS), ids))
    ]
    assert lost[1] < 0.1 * lost[0]


class Odd(Scale):
    """Transposed outputs, a mask beside them, and one NaN in the first row."""

    def forward(self, x, mask=None):
        x = x.mT if mask is not None else x
        if mask is None:
            mask = torch.arange(x.shape[0] * 3).view(-1, 3)
            x = torch.where((torch.arange(x.shape[0])[:, None, None] == 0) & (torch.arange(WIDTH) == 5), torch.nan, x)
        self.mask = mask
        y = super().forward(x)
        return (y.mT, mask) if self.number < dist.get_world_size() - 1 else y

    def __init__(self, number):
        super().__init__(number)
        self.number = number


@process_ranks(3)
def test_nan_and_odd_tensors_cross():
    for forward in ("int4", "tiles", "bf16"):
        (stage,) = train(ScheduleGPipe, encoded(forward, "int8"), module=Odd)
        seen = stage.submod
        assert torch.equal(seen.mask, torch.arange(ROWS * 3).view(-1, 3))
        if dist.get_rank():
            assert bool(seen.inputs[-1][0, :, 5].isnan().all()), forward
            assert bool(seen.inputs[-1][-1, -1].isfinite().any()), forward
        if not stage.is_last:
            assert seen.received[-1].shape == seen.outputs[-1].shape


@process_ranks(2)
def test_what_is_wrong_is_said_on_all_ranks():
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"rank 0 has .*int4.*rank 1 has .*int8"):
        encoded("int8" if rank else "int4", "int8")(nn.Linear(2, 2), rank, 2)
    with pytest.raises(ValueError, match="gradients of a sample"):
        encoded("int4", commq.Differences(samples=4))(nn.Linear(2, 2), rank, 2)
    with pytest.raises(TypeError, match="a boundary's way is a int"):
        encoded(4, "int8")(nn.Linear(2, 2), rank, 2)
    with pytest.raises(ValueError, match=r"call stage\.set_samples"):
        train(ScheduleGPipe, encoded(commq.Differences(samples=4), "int8"))
    stage = encoded(commq.Differences(samples=4), "int8")(nn.Linear(2, 2), rank, 2)
    for ids in (torch.tensor([1, 1]), torch.tensor([1.0]), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected int64, 1-D"):
            stage.set_samples(ids)
    ids = torch.tensor([2, 1])
    stage.set_samples(ids)
    ids.zero_()  # by a loader that fills its tensor anew
    assert stage._samples.host.tolist() == stage._samples.device.tolist() == [2, 1]


def crossings(way, rows, width):
    """The two sides of a boundary."""
    like, memory = torch.empty(rows, width), Memory()
    return [way.crossing(Place(0, False, sends, 0, 0, memory, "auto"), like) for sends in (True, False)]


def cross(sides, x, turn):
    wire, y = torch.empty(sides[0].nbytes(turn), dtype=torch.uint8), torch.empty(x.numel())
    sides[0].encode(x.flatten(), wire, turn)
    sides[1].decode(wire, y, turn)
    return y.view_as(x)


@pytest.mark.parametrize("first", ["bf16", "int4"])
def test_differences_are_rotated_and_first_crossings_are_not(first):
    """Also where both have one format, whose blocks are shorter than the rotation."""
    fmt = commq.get_format("int4", block=32)
    first = fmt if first == "int4" else commq.get_format(first)
    way = commq.Differences(samples=2, format=fmt, first=first, rotation=commq.Rotation(size=64))
    sides, ids = crossings(way, 2, 33), torch.arange(2)
    x = torch.randn(2, 33, generator=torch.Generator().manual_seed(0))
    lost = [float((cross(sides, x, Turn(step, 0, Samples(ids, ids))) - x).norm()) for step in range(3)]
    assert lost[1] < 0.2 * lost[0]


def test_rows_asked_for_before_a_state_is_loaded_are_read_anew():
    sides, ids = crossings(commq.Differences(samples=2), 2, 32), torch.arange(2)
    samples = Samples(ids, ids)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    cross(sides, x, Turn(0, 0, samples))
    states = [side.state_dict() for side in sides]
    expected = cross(sides, -3.0 * x, Turn(1, 0, samples))
    for side, state in zip(sides, states, strict=True):
        side.prefetch(samples)
        side.load_state_dict(state)
    assert torch.equal(cross(sides, -3.0 * x, Turn(1, 0, samples)), expected)


def test_samples_out_of_range_are_refused_when_they_cross():
    sides = crossings(commq.Differences(samples=2), 2, 32)
    for number in (-1, 2):
        ids = torch.tensor([0, number])
        samples = Samples(ids, ids)
        sides[0].prefetch(samples)
        with pytest.raises(ValueError, match="expected 2 with numbers from 0 to 1"):
            cross(sides, torch.ones(2, 32), Turn(0, 0, samples))


@process_ranks(2)
def test_a_stage_goes_on_from_its_state(tmp_path):
    ids, way = torch.arange(CHUNKS * ROWS), commq.Differences(samples=CHUNKS * ROWS)
    (going,) = train(Schedule1F1B, encoded(way, "int8"), steps=2, ids=ids)
    (saved,) = train(Schedule1F1B, encoded(way, "int8"), steps=1, ids=ids)
    file = tmp_path / str(dist.get_rank())
    torch.save(saved.boundary_state(), file)

    def resumed(module, number, count):
        stage = encoded(way, "int8")(module, number, count)
        stage.load_boundary_state(torch.load(file, weights_only=True))
        return stage

    (again,) = train(Schedule1F1B, resumed, steps=1, ids=ids)
    assert torch.equal(again.submod.weight.grad, going.submod.weight.grad)
    assert again.sent_bytes == going.sent_bytes


def train_until_one_dies(victim, ahead):
    roll_call.PATIENCE = timedelta(seconds=3)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stage = encoded("int4", "int8", ahead=ahead)(Scale(rank), rank, world_size)
    runs = Schedule1F1B(stage, n_microbatches=CHUNKS, loss_fn=lambda y, target: (y * target).sum())
    x, target = batch()
    for step in range(10_000):
        if step == 3 and rank == victim:
            os._exit(9)
        with stage.watch() if ahead == 0 else nullcontext():
            runs.step(*([x] if rank == 0 else []), **({"target": target} if rank == world_size - 1 else {}))


@pytest.mark.parametrize(("victim", "ahead"), [(0, 1), (2, 0)])
def test_a_stage_that_dies_is_named_by_all_others(victim, ahead):
    """By those that only wait for survivors, too."""
    with pytest.raises(RankError) as caught:
        run_processes(train_until_one_dies, 4, args=(victim, ahead))
    said = str(caught.value)
    for survivor in {0, 1, 2, 3} - {victim}:
        assert f"RankLostError: rank {survivor} of 4: a step failed: rank {victim} has died" in said


def fail_alone():
    stage = encoded("int4", "int8")(Scale(dist.get_rank()), dist.get_rank(), 2)
    try:
        with stage.watch():
            raise RuntimeError("of the user's own")
    except RuntimeError as error:
        return type(error).__name__


ANSWERS_WITHOUT_PAUSE = """
import torch.distributed as dist
from commq.collectives import roll_call
roll_call.PERIOD = 0.0
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.TCPStore("localhost", 0, 1, True))
with roll_call.RollCall.of(dist.group.WORLD):
    dist.barrier()
"""


def test_a_process_ends_while_its_thread_answers():
    """And is not aborted by the interpreter, which finds the thread in the store."""
    ended = subprocess.run([sys.executable, "-c", ANSWERS_WITHOUT_PAUSE], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_an_error_of_ranks_that_live_stays_as_it_is():
    assert run_processes(fail_alone, 2) == ["RuntimeError", "RuntimeError"]
