"""Recipes: a whole configuration as one frozen value.

A recipe says what is sent (formats of both hops), how it is rounded and rotated, what is fed back, and which
parameters are exempt. What cannot be combined is refused here, when the recipe is made, with the reason.

Defaults follow measurements; the note beside each recipe says which.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from commq.codecs.formats import Format, get_format
from commq.codecs.ops import check_coding
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.feedback.rule import Feedback


@dataclass(frozen=True, kw_only=True)
class Exempt:
    """Which parameters' gradients travel uncoded (as bf16, in the same exchange)."""

    one_dimensional: bool = True
    """Biases and norms: few bytes, and their gradients do not look like their neighbours'."""
    min_numel: int = 2048
    """Parameters with fewer elements than this are exempt too."""
    format: Format = get_format("bf16")

    def __post_init__(self) -> None:
        if self.format.kind != "raw":
            raise ValueError(f"exempt format={self.format}: expected fp32, bf16 or fp16")
        if self.min_numel < 0:
            raise ValueError(f"exempt min_numel={self.min_numel}: expected elements >= 0")

    def covers(self, shape: tuple[int, ...], numel: int) -> bool:
        return (self.one_dimensional and len(shape) <= 1) or numel < self.min_numel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What travels, and how."""

    name: str
    format: Format
    """First hop: every rank's gradient, on its way to the owner of a chunk."""
    answer: Format | None = None
    """Second hop: the owner's reduced chunk, on its way to everybody. None: like the first hop."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotation: Rotation | None = None
    feedback: Feedback = Feedback()
    """Error feedback of the first hop, on every rank."""
    exempt: Exempt = Exempt()
    seed: int = 0
    """Seed of stochastic rounding and random signs (32 bits, the same on all ranks)."""

    def __post_init__(self) -> None:
        expected = {"format": Format, "rotation": Rotation, "answer": Format, "feedback": Feedback, "exempt": Exempt}
        for name, kind in expected.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in ("rotation", "answer")):
                raise ValueError(f"{name}={value!r}: expected a commq.{kind.__name__}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: expected a whole number")
        coding = Coding(rounding=self.rounding, rotation=self.rotation)
        for fmt in (self.format, self.answer_format):
            check_coding(fmt, coding)
        if self.feedback.rule != "none" and self.format.kind == "raw":
            raise ValueError(
                f"feedback rule={self.feedback.rule!r} with format {self.format.name!r}: error feedback keeps what a "
                "block format lost; use feedback='none', or a format such as int8 or int4"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected 0 <= seed < 2**32")

    def __str__(self) -> str:
        rotation = f"rotation {self.rotation.size}{' with signs' * self.rotation.signs}" if self.rotation else ""
        rule = self.feedback
        feedback = "no feedback" if rule.rule == "none" else f"{rule.rule} feedback in {rule.storage}"
        formats = f"{self.format} -> {self.answer_format}"
        return ", ".join(
            part for part in (f"{self.name}: {formats}", f"{self.rounding} rounding", rotation, feedback) if part
        )

    @property
    def answer_format(self) -> Format:
        return self.answer or self.format

    @property
    def unit(self) -> int:
        """Elements that must stay together: parameters start at multiples of this in what is encoded."""
        return max(self.format.unit, self.answer_format.unit, self.rotation.size if self.rotation else 1)


_RECIPES = {
    r.name: r
    for r in (
        Recipe(name="fp32", format=get_format("fp32")),
        Recipe(name="bf16", format=get_format("bf16")),
        Recipe(name="fp8", format=get_format("fp8_e4m3")),
        Recipe(name="int8", format=get_format("int8")),
        # Averaged feedback costs nothing in loss at 4 bits and removes the bias of rounding; classic costs 1 %.
        Recipe(name="int4", format=get_format("int4"), feedback=Feedback(rule="averaged")),
        # A control: rounding to -1, 0, 1 without feedback is visibly worse than int4.
        Recipe(name="int2", format=get_format("int2")),
        # Signs cost most of their loss on the second hop, where a mean of signs is rounded to a sign again: two bits
        # there and a rotation cut the gap to fp32 from 9.1 to 4.2 % (2 ranks) and from 5.6 to 3.9 % (4 ranks, one
        # seed each). Feedback on one-bit gradients hurts AdamW (classic and averaged: 16 to 21 % instead of 6 %).
        Recipe(
            name="onebit",
            format=get_format("sign", block=256),
            answer=get_format("int2", block=256, scale="bf16"),
            rotation=Rotation(size=32),
        ),
    )
}


def recipes() -> list[str]:
    """Names that `recipe` knows."""
    return list(_RECIPES)


def recipe(name: str, **overrides: Any) -> Recipe:
    """The recipe `name`, with some of its fields replaced.

    Formats may be given by name, a rotation by its size, feedback by its rule. `block=` sets the block of the
    formats that have one. Examples: recipe("int4", block=64), recipe("int4", feedback="none", rotation=32).
    Raises ValueError for unknown names and for combinations that cannot be.
    """
    if name not in _RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; expected one of {', '.join(_RECIPES)}")
    base = _RECIPES[name]
    known = {f.name for f in fields(Recipe)} - {"name"} | {"block"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"recipe {name!r} has no {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    block = overrides.pop("block", None)
    for key in ("format", "answer"):
        if isinstance(overrides.get(key), str):
            overrides[key] = get_format(overrides[key])
    if isinstance(overrides.get("rotation"), int):
        overrides["rotation"] = Rotation(size=overrides["rotation"])
    if isinstance(overrides.get("feedback"), str):
        overrides["feedback"] = replace(base.feedback, rule=overrides["feedback"])
    if block is not None:
        formats = {key: overrides.get(key, getattr(base, key)) for key in ("format", "answer")}
        blocked = {key: fmt for key, fmt in formats.items() if fmt is not None and fmt.kind != "raw"}
        if not blocked:
            raise ValueError(f"block={block} for recipe {name!r}: its formats are raw and have no blocks; drop block=")
        overrides |= {key: get_format(fmt.name, block=block, scale=fmt.scale) for key, fmt in blocked.items()}
    return replace(base, **overrides) if overrides else base
