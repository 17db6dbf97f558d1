"""Recipes: names, overrides, and what is refused when it is made."""

import dataclasses

import pytest

import commq

METHODS = [
    *("qsgd", "loco", "tlq-hs", "loco-two-hop", "onebit-sgd", "doublesqueeze", "ef-signsgd", "thc"),
    *(
        "eden1",
        "eden2",
        "eden3",
        "eden4",
        "eden2-feedback",
        "alq3",
        "amq3",
        "double-quantization",
        "dynamic8",
        "marsit",
    ),
]


def test_names():
    assert commq.recipes()[:7] == ["fp32", "bf16", "fp8", "int8", "int4", "int2", "onebit"]
    assert commq.recipes()[7:] == [*METHODS, "full-shard", "sdp4bit", "hybrid-shard", "zero++", "qsdp"]
    for name in commq.recipes():
        assert commq.recipe(name).name == name


def test_overrides():
    r = commq.recipe("int4", block=64, rotation=32, feedback="none", answer="int8", seed=7)
    assert (r.format.block, r.rotation, r.feedback.rule) == (64, commq.Rotation(size=32), "none")
    assert (r.answer_format.name, r.seed) == ("int8", 7)
    assert r.unit == r.answer_format.block == 64
    assert commq.recipe("int4", block=64, answer="bf16").answer_format == commq.get_format("bf16")
    assert commq.recipe("int4") == commq.recipe("int4")


def test_what_a_log_shows():
    assert (
        str(commq.recipe("int4")) == "int4: int4/128:bf16 -> int4/128:bf16, nearest rounding, averaged feedback in fp32"
    )
    assert str(commq.recipe("onebit", seed=3)).endswith("int2/256:bf16, nearest rounding, rotation 32, no feedback")


def test_frozen_and_complete_repr():
    r = commq.recipe("int4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.seed = 1
    assert repr(r) != repr(commq.recipe("int4", seed=1)) != repr(commq.recipe("int4", block=64))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: commq.recipe("int5"), "'int5' is unknown; expected one of fp32, bf16"),
        (lambda: commq.recipe("int4", blok=64), "has no blok; expected some of adapt, answer, .*block"),
        (lambda: commq.recipe("int4", block=100), "block=100 .* power of two"),
        (lambda: commq.recipe("bf16", feedback="classic"), "error feedback keeps what a block format lost"),
        (lambda: commq.recipe("fp32", rounding="stochastic"), "fp32 loses nothing"),
        (lambda: commq.recipe("fp32", rotation=32), "fp32 has no scale; drop the rotation"),
        (lambda: commq.recipe("int4", rotation=48), "power of two from 16 to 1024"),
        (lambda: commq.recipe("int4", feedback="mean"), "expected 'none', 'classic' or 'averaged'"),
        (lambda: commq.Feedback(rule="averaged", decay=1.0), "0 < decay < 1"),
        (lambda: commq.recipe("int4", seed=-1), "0 <= seed"),
        (lambda: commq.recipe("bf16", block=64), "are raw and have no blocks"),
        (lambda: commq.recipe("int4", answer=3), "answer=3: expected a commq.Format"),
        (lambda: commq.recipe("int4", feedback=None), "feedback=None: expected a commq.Feedback"),
        (lambda: commq.recipe("int4", rotation="32"), "rotation='32': expected a commq.Rotation"),
        (lambda: commq.recipe("int4", seed=1.5), "expected a whole number"),
        (lambda: commq.recipe("int4", block="64"), "block='64' .* power of two"),
        (lambda: commq.Exempt(format=commq.get_format("int8")), "expected fp32, bf16 or fp16"),
        (lambda: commq.get_format("mxfp8", scale="fp32"), "expected one of e8m0"),
    ],
)
def test_refused_with_the_reason(make, says):
    with pytest.raises(ValueError, match=says):
        make()
