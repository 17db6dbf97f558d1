"""Buckets under way while backward goes on: in which order, until when, and what errors leave behind."""

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commq
from against_plain import Net, backward, batch, grads_of, run, same_bits, same_on_all_ranks, vector
from commq.attach.clock import EVERY, Clock
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.transport import C10d
from fake_bucket import FakeBucket, Recorder, buckets_of, exchange_all
from harness import process_ranks, thread_ranks


def weights(count):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(64, 64, generator=generator)) for _ in range(count)]


def test_moves_overlap_across_buckets():
    """While a bucket is encoded, the all-to-all of the one before and the all-gather of that before are under way."""
    transport = Recorder()
    state = commq.HookState("int4", transport=transport)
    logs, futures = [], []
    buckets = buckets_of(*([p] for p in weights(4)))
    exchange_all(state, buckets)
    for bucket in buckets:
        futures.append(commq.comm_hook(state, bucket))
        logs.append(transport.log.copy())
        transport.log.clear()
        if not bucket.is_last():
            assert [future.done() for future in futures] == [i < bucket.index() - 1 for i in range(bucket.index() + 1)]
    assert logs == [
        ["all_to_all 0"],
        ["all_to_all 1", "wait 0", "all_gather 2"],
        ["all_to_all 3", "wait 1", "all_gather 4", "wait 2"],
        ["all_to_all 5", "wait 3", "all_gather 6", "wait 4", "wait 5", "all_gather 7", "wait 6", "wait 7"],
    ]
    assert all(future.done() for future in futures)


def test_moves_overlap_within_a_bucket(monkeypatch):
    monkeypatch.setitem(PIECE_BYTES, "cpu", 4096 * 4)
    transport = Recorder()
    state = commq.HookState("int4", transport=transport)
    commq.comm_hook(state, buckets_of(weights(3))[0])
    assert transport.log == [
        *("all_to_all 0", "all_to_all 1", "wait 0", "all_gather 2", "all_to_all 3", "wait 1", "all_gather 4"),
        *("wait 2", "wait 3", "all_gather 5", "wait 4", "wait 5"),
    ]


def test_the_synchronous_call_waits():
    state = commq.HookState("int4", transport=Recorder())
    for step in range(2):
        for bucket in buckets_of(*([p] for p in weights(3))):
            assert state.exchange(bucket) is bucket.buffer()
            assert "wait" in state.transport.log[-1]
            assert state.stats().steps == step + bucket.is_last()


def test_a_step_that_was_broken_off_is_forgotten():
    """The bucket left over never arrives in its buffer, and the next step is a step of its own."""
    state = commq.HookState("int4", transport=Recorder())
    parameters = weights(2)
    exchange_all(state, buckets_of([parameters[0]], [parameters[1]]))
    left = buckets_of([parameters[0]], [parameters[1]])[0]
    before = left.buffer().clone()
    future = commq.comm_hook(state, left)
    for bucket in buckets_of([parameters[0]], [parameters[1]]):
        assert bool(state.exchange(bucket).eq(0).all())  # all that the recorder brings are zeros
    assert not future.done() and torch.equal(left.buffer(), before)
    assert state.stats().steps == 3


def test_an_error_in_a_hook_leaves_nothing_under_way():
    state = commq.HookState("int4", transport=Recorder())
    buckets = buckets_of(*([p] for p in weights(2)))
    exchange_all(state, buckets)
    future = commq.comm_hook(state, buckets[0])
    state.transport.fails = True
    with pytest.raises(RuntimeError, match="all_to_all failed"):
        commq.comm_hook(state, buckets[1])
    state.transport.fails = False
    state.transport.log.clear()
    for bucket in buckets:
        commq.comm_hook(state, bucket)
    assert len(state.transport.log) == 8 and not future.done()
    assert state.stats().steps == 3


class Event:
    """A CUDA event: a second passes between the two of a pair."""

    def __init__(self, log):
        self.log = log

    def record(self, stream):
        self.log.append(stream)

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000.0


def test_the_clock_times_some_steps_for_all(monkeypatch):
    """One second in each of three buckets a step: all of the first EVERY steps, then one in EVERY."""
    clock, log = Clock(), []
    monkeypatch.setattr(clock, "_pair", lambda: (Event(log), Event(log)))
    for step in range(3 * EVERY):
        for _ in range(3):
            pair = clock.begin("side")
            assert (pair is not None) == (step < EVERY or step % EVERY == 0)
            if pair is not None:
                clock.end(pair, "side")
        clock.next_step()
    assert clock.seconds() == 3 * 3 * EVERY
    assert log == ["side"] * (2 * 3 * (EVERY + 2))


def test_copies_of_gradients_have_memory_while_they_travel():
    """Weights of no whole number of blocks are copied to aligned places, by views that serve in every step."""
    state, laid = commq.HookState("int4", transport=Recorder()), []
    buckets = buckets_of([nn.Parameter(torch.empty(65, 65)) for _ in range(3)], weights(1))
    for step in range(3):
        gradients = torch.randn(3, 65 * 65, generator=torch.Generator().manual_seed(step))
        buckets[0].buffer().copy_(gradients.flatten())
        commq.comm_hook(state, buckets[0])
        laid.append(state._layouts._known[0, 0].laid)
        copy = laid[-1].coded[0].x_N
        assert copy.untyped_storage().nbytes() == copy.nbytes > gradients.nbytes
        places = copy.view(3, -1)
        assert torch.equal(places[:, : 65 * 65], gradients) and not bool(places[:, 65 * 65 :].any())
        commq.comm_hook(state, buckets[1])
        assert copy.untyped_storage().nbytes() == 0
        assert not bool(buckets[0].buffer().any())  # what the recorder brings
    assert laid[0] is laid[1] is laid[2]


@thread_ranks(1, 3)
@pytest.mark.parametrize("recipe", ["int4", "doublesqueeze", "loco"])
def test_going_back_to_a_saved_state(recipe):
    """In a handle that has gone on, after a step that was broken off: to the bit, and to the beginning, too."""
    named = [(f"weight{i}", p) for i, p in enumerate(weights(2))]
    state = commq.HookState(recipe, transport=C10d(), named=named)

    def buckets(step):
        noise = torch.Generator().manual_seed(31 * step + dist.get_rank())
        return [FakeBucket(i, [p], i == 1, torch.randn(p.numel(), generator=noise)) for i, (_, p) in enumerate(named)]

    def steps(*numbers):
        return [state.exchange(bucket).clone() for step in numbers for bucket in buckets(step)]

    def holds(saved):
        now = state.state_dict()
        return same(now["residual"], saved["residual"]) and now["step"] == saved["step"]

    saved = [state.state_dict()]
    sent = steps(0, 1)
    saved.append(state.state_dict())
    sent += steps(2, 3)
    end = state.state_dict()
    for start in (1, 0, 0):
        commq.comm_hook(state, buckets(7)[0])
        state.load_state_dict(saved[start])
        again = steps(*range(2 * start, 4))
        assert all(map(torch.equal, again, sent[4 * start :])) and holds(end)


def same(one, other):
    """Nested dicts and lists of tensors and plain data, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Hooked(nn.Module):
    """Its second layer's input may raise in backward, after the last layer's bucket was sent."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(37, 64), nn.Linear(64, 64)
        self.raises = False

    def forward(self, x):
        y = torch.relu(self.first(x))
        if self.raises:
            y.register_hook(self.fail)
        return self.last(y)

    def fail(self, grad):
        raise ArithmeticError("on purpose")


@process_ranks(2)
def test_an_error_in_backward():
    """DDP itself must be made anew after that, on the same model; the group goes on."""
    torch.manual_seed(0)
    model = Hooked()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    handle = commq.register(ddp, "int8")
    backward(ddp, 0)
    model.raises = True
    with pytest.raises(ArithmeticError):
        backward(ddp, 1)
    assert handle.stats().steps == 1
    model.raises = False
    del ddp
    gc.collect()
    again = DistributedDataParallel(model, bucket_cap_mb=0.001)
    commq.register(again, "int8")
    again.zero_grad()
    backward(again, 2)
    found = grads_of(dict(model.named_parameters()))
    del again
    gc.collect()
    model.zero_grad()
    fresh = DistributedDataParallel(model)
    commq.register(fresh, "int8")
    backward(fresh, 2)
    assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters())


@process_ranks(2, 3)
@pytest.mark.parametrize("recipe", ["int4", "doublesqueeze", "thc", "marsit"])
def test_the_bits_of_buckets_that_wait_for_nobody(recipe, monkeypatch):
    """Many buckets of several pieces in flight against the same ones, each exchanged before the next."""
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1 << 12)

    def build():
        return DistributedDataParallel(Net(), bucket_cap_mb=0.001)

    overlapped = run(build, backward, recipe)
    monkeypatch.setattr(commq.attach.ddp, "comm_hook", one_by_one)
    same_bits(run(build, backward, recipe), overlapped)
    assert same_on_all_ranks(vector(overlapped.parameters.values()))


def one_by_one(state: commq.HookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future = torch.futures.Future()
    future.set_result(state.exchange(bucket))
    return future


@process_ranks(2)
def test_skipped_buckets_without_a_module():
    """PyTorch's own two lines: the hook cannot know that the last bucket is left out; backward ends all the same."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(37, 65), nn.Linear(37, 65)

        def forward(self, x):
            return self.second(x)

    ddp = DistributedDataParallel(
        Skipping(), find_unused_parameters=True, skip_all_reduce_unused_params=True, bucket_cap_mb=0.001
    )
    state = commq.HookState("int8")
    ddp.register_comm_hook(state, commq.comm_hook)
    for number in range(3):
        ddp.zero_grad()
        ddp(batch(number)).square().mean().backward()
        assert same_on_all_ranks(ddp.module.second.weight.grad)
