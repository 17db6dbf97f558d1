"""Residuals: what they keep, across buckets, checkpoints, loss scales and world sizes."""

import pytest
import torch

import commq
from commq.codecs.formats import get_format
from commq.codecs.reference import Coding, decode_bucket, encode_bucket
from commq.codecs.wire import Layout
from commq.feedback.residual import Residual, Segment

BLOCK = 32
SEGMENTS = [Segment("a", 0, 64), Segment("b", 64, 40), Segment("c", 128, 1)]


def step(gradient, stored, weight=0.0, fmt=None):
    """Encode once with feedback; returns what was sent."""
    layout = Layout(fmt or get_format("int4", block=BLOCK), gradient.numel())
    wire = torch.empty(1, layout.chunk_bytes, dtype=torch.uint8)
    encode_bucket(
        gradient, wire, layout, Coding(), residual_N=stored.values, residual_scales_G=stored.scales, decay=weight
    )
    sent = torch.empty_like(gradient)
    decode_bucket(wire, layout, sent, Coding())
    return sent


@pytest.fixture(params=["fp32", "bf16", "int8"])
def residual(request):
    return Residual(commq.Feedback(rule="classic", storage=request.param), BLOCK)


def filled(residual, segments=SEGMENTS, numel=160):
    stored = residual.bind(segments, numel, torch.device("cpu"))
    gradient = torch.zeros(numel)
    for s in segments:
        gradient[s.offset : s.offset + s.numel] = torch.randn(s.numel)
    step(gradient, stored)
    return stored


def by_name(stored, segments, block=BLOCK):
    values = stored.to_float(block)
    return {s.name: values[s.offset : s.offset + s.numel].clone() for s in segments}


def test_a_rebuilt_bucket_keeps_every_bit(residual):
    before = by_name(filled(residual), SEGMENTS)
    moved = [Segment("c", 0, 1), Segment("b", 32, 40), Segment("a", 96, 64)]
    after = by_name(residual.bind(moved, 160, torch.device("cpu")), moved)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert float(before["a"].abs().max()) > 0


def test_state_dict_restores_every_bit(residual, tmp_path):
    before = by_name(filled(residual), SEGMENTS)
    torch.save(residual.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for bind_first in (False, True):
        fresh = Residual(residual.feedback, BLOCK)
        stored = fresh.bind(SEGMENTS, 160, torch.device("cpu")) if bind_first else None
        fresh.load_state_dict(state)
        stored = stored or fresh.bind(SEGMENTS, 160, torch.device("cpu"))
        after = by_name(stored, SEGMENTS)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_state_of_another_recipe_is_refused(residual):
    filled(residual)
    state = residual.state_dict()
    with pytest.raises(ValueError, match="saved with"):
        Residual(residual.feedback, 2 * BLOCK).load_state_dict(state)
    other = Residual(residual.feedback, BLOCK)
    stored = filled(other, [Segment("b", 0, 40), Segment("a", 64, 63)], 128)
    before = stored.to_float(BLOCK).clone()
    with pytest.raises(ValueError, match="'a' has 64 elements in the checkpoint, the parameter has 63"):
        other.load_state_dict(state)
    assert torch.equal(stored.to_float(BLOCK), before) and before.any()


def test_classic_loses_nothing_to_the_bit():
    """gradient + old residual == sent + new residual, step after step, in float32."""
    residual = Residual(commq.Feedback(rule="classic"), BLOCK)
    stored = residual.bind([Segment("a", 0, 100)], 100, torch.device("cpu"))
    for _ in range(5):
        gradient = torch.randn(100) * torch.logspace(-3, 3, 100)
        old = stored.values.clone()
        sent = step(gradient, stored)
        assert torch.equal(gradient + old, sent + stored.values)


def test_averaged_rule():
    """e <- 0.8 e + 0.2 (h - sent), in this order of roundings."""
    feedback = commq.Feedback(rule="averaged", decay=0.8)
    stored = Residual(feedback, BLOCK).bind([Segment("a", 0, 96)], 96, torch.device("cpu"))
    for _ in range(3):
        gradient, old = torch.randn(96), stored.values.clone()
        sent = step(gradient, stored, weight=feedback.weight)
        assert torch.equal(stored.values, old * 0.8 + ((gradient + old) - sent) * (1.0 - 0.8))


def test_feedback_sends_what_rounding_alone_never_would():
    """A constant gradient of 0.4 steps beside a large one: rounding sends 0 for ever, classic feedback its mean."""
    gradient = torch.full((BLOCK,), 0.4 / 7)
    gradient[0] = 1.0
    stored = Residual(commq.Feedback(rule="classic"), BLOCK).bind([Segment("a", 0, BLOCK)], BLOCK, torch.device("cpu"))
    total = sum(step(gradient, stored) for _ in range(100))
    assert float((total - 100 * gradient).abs().max()) <= 0.5 / 7 * 1.2  # one residual: half a step of h


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_never_non_finite(storage):
    fmt = get_format("int4", block=BLOCK)
    stored = Residual(commq.Feedback(rule="classic", storage=storage), BLOCK).bind(
        [Segment("a", 0, 96)], 96, torch.device("cpu")
    )
    step(torch.randn(96), stored)
    before = stored.to_float(BLOCK).clone()
    for bad in (float("nan"), float("inf")):
        gradient = torch.randn(96)
        gradient[40] = bad
        sent = step(gradient, stored, fmt=fmt)
        after = stored.to_float(BLOCK)
        assert bool(sent[32:64].isnan().all()) and bool(sent[:32].isfinite().all())
        assert torch.equal(after[32:64], before[32:64])  # the marked block keeps its residual
        assert not torch.equal(after[:32], before[:32])  # the others advance
    step(torch.full((96,), torch.finfo(torch.float32).max), stored)
    step(torch.full((96,), torch.finfo(torch.float32).max), stored)
    assert bool(stored.to_float(BLOCK).isfinite().all())


def test_loss_scale(residual):
    stored = filled(residual)
    before = stored.to_float(BLOCK).clone()
    residual.set_loss_scale(1024.0)
    assert torch.equal(stored.to_float(BLOCK), before * 1024)
    residual.set_loss_scale(1.0)
    assert torch.equal(stored.to_float(BLOCK), before)
    with pytest.raises(ValueError, match="finite number above 0"):
        residual.set_loss_scale(float("inf"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_fold_keeps_the_sum_over_ranks(ranks):
    feedback = commq.Feedback(rule="classic")
    olds = [Residual(feedback, BLOCK) for _ in range(4)]
    total = sum(filled(old).values.to(torch.float64) for old in olds)
    states = commq.fold([old.state_dict() for old in olds], ranks)
    assert len(states) == ranks
    news = []
    for state in states:
        new = Residual(feedback, BLOCK)
        new.load_state_dict(state)
        news.append(new.bind(SEGMENTS, 160, torch.device("cpu")).values.to(torch.float64))
    # Sums of at most 4 float32 numbers in float32: 3 roundings of partial sums.
    magnitude = sum(old.bind(SEGMENTS, 160, torch.device("cpu")).values.abs() for old in olds)
    assert bool(((sum(news) - total).abs() <= 3 * 2.0**-24 * magnitude).all())


def test_fold_of_low_bit_storage_keeps_the_sum_within_its_rounding():
    for storage, relative in (("bf16", 2.0**-8), ("int8", 0.5 / 127)):
        olds = [Residual(commq.Feedback(rule="classic", storage=storage), BLOCK) for _ in range(4)]
        floats = [filled(old).to_float(BLOCK) for old in olds]
        total = sum(floats)
        (state,) = commq.fold([old.state_dict() for old in olds], 1)
        new = Residual(olds[0].feedback, BLOCK)
        new.load_state_dict(state)
        folded = new.bind(SEGMENTS, 160, torch.device("cpu")).to_float(BLOCK)
        assert float((folded - total).abs().max()) <= relative * float(total.abs().max()) * (1 + 2.0**-10)


def test_reset_is_a_function_of_the_step():
    rule = commq.Feedback(rule="averaged", reset_every=3)
    assert [rule.resets(s) for s in range(7)] == [False, False, False, True, False, False, True]
    assert not any(commq.Feedback(rule="classic", reset_every=3).resets(s) for s in range(7))
    assert not any(commq.Feedback(rule="averaged", reset_every=0).resets(s) for s in range(7))
