"""Recipes: a whole configuration as one frozen value.

A recipe says what is sent (formats of the hops), how it is rounded and rotated, what is fed back, by which schedule it
travels, and which parameters are exempt or have formats of their own. What cannot be combined is refused here, when
the recipe is made, with the reason. `recipes.py` has those with names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from commq.codecs.formats import Format
from commq.codecs.levels import symmetric
from commq.codecs.ops import check_coding
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.collectives.route import check_schedule
from commq.feedback.rule import Feedback
from commq.policy.exempt import Exempt
from commq.policy.levels import Adapt
from commq.policy.phase import Phase
from commq.policy.rule import Rule
from commq.policy.widths import Widths

_KINDS = {
    "format": Format,
    "answer": Format,
    "inside": Format,
    "weights": Format,
    "rotation": Rotation,
    "feedback": Feedback,
    "answer_feedback": Feedback,
    "exempt": Exempt,
}
_OPTIONAL = ("rotation", "answer", "inside", "weights")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What travels, and how."""

    name: str
    format: Format
    """First hop: every rank's gradient, on its way to the owner of a chunk."""
    answer: Format | None = None
    """Second hop: the owner's reduced chunk, on its way to everybody. None: like the first hop."""
    inside: Format | None = None
    """Between ranks of one host, for schedule two_hop. None: int8 where `format` has fewer bits, else like it."""
    schedule: str = "two_shot"
    """How it travels: one of those of `commq.all_reduce`."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotation: Rotation | None = None
    feedback: Feedback = Feedback()
    """Error feedback of the first hop, on every rank."""
    answer_feedback: Feedback = Feedback()
    """Error feedback of the second hop, on the owner: none or classic, in fp32."""
    exempt: Exempt = Exempt()
    rules: tuple[Rule, ...] = ()
    """Formats of parameters by name; the first rule that matches holds."""
    adapt: Adapt | Widths | None = None
    """When and how `format` follows the gradients: its levels (a table, rounded stochastically), or its bits (eden)."""
    phases: tuple[Phase, ...] = ()
    """What holds before the recipe's own formats do, one after the other."""
    weights: Format | None = None
    """Sharded training: how parameters are gathered. None: as they are."""
    weights_rounding: Literal["nearest", "stochastic"] = "nearest"
    weights_difference: bool = False
    """Gather the difference to what all ranks already hold: `weights` may then be 4 bits, at the cost of one full copy
    of the parameters on each rank (SDP4Bit). Only where parameters are kept after the forward pass."""
    secondary: bool = False
    """Keep what was gathered inside each host after the forward pass: the backward pass gathers it there (hpZ)."""
    seed: int = 0
    """Seed of stochastic rounding and random signs (32 bits, the same on all ranks)."""

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in _OPTIONAL):
                raise ValueError(f"{name}={value!r}: expected a commq.{kind.__name__}")
        for name, kind in (("rules", Rule), ("phases", Phase)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, kind) for each in value):
                raise ValueError(f"{name}={value!r}: expected a tuple of commq.{kind.__name__}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: expected a whole number")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected 0 <= seed < 2**32")
        coding = Coding(rounding=self.rounding, rotation=self.rotation)
        for fmt in (self.format, self.answer_format, *(fmt for fmt in self._later() if fmt.kind != "raw")):
            check_coding(fmt, coding)
        self._check_feedback()
        self._check_adapt()
        self._check_weights()
        for fmt in (self.format, *(rule.format for rule in self.rules), *(phase.format for phase in self.phases)):
            check_schedule(
                self.schedule,
                fmt,
                residual=self.feedback.rule != "none",
                answer_residual=self.answer_feedback.rule != "none",
            )
        if self.inside is not None and self.schedule not in ("two_hop", "auto"):
            raise ValueError(f"inside={self.inside} with schedule {self.schedule!r}; it goes with two_hop and auto")

    def _check_adapt(self) -> None:
        if self.adapt is None:
            return
        if isinstance(self.adapt, Widths):
            plain = self.feedback.rule == self.answer_feedback.rule == "none" and self.answer is not None
            if self.format.fit != "unbiased" or not plain:
                raise ValueError(
                    f"adapt={self.adapt} with format {self.format.name!r} and answer {self.answer}: expected one of "
                    "eden1 to eden4, an answer of its own, and no feedback"
                )
            return
        if not isinstance(self.adapt, Adapt):
            raise ValueError(f"adapt={self.adapt!r}: expected a commq.Adapt or commq.Widths")
        fixed = self.answer_feedback.rule != "none" or self.rounding != "stochastic"
        positive = tuple(level for level in self.format.levels if level > 0)
        tables = (symmetric(positive, zero) for zero in (False, True)) if positive else ()
        if fixed or self.format.kind != "levels" or self.format.fit != "largest" or self.format.levels not in tables:
            raise ValueError(
                f"adapt with format {self.format.name!r}, rounding={self.rounding!r} and answer_feedback="
                f"{self.answer_feedback.rule!r}: expected a table of levels with as many negative as positive ones, "
                "such as alq3 or amq3, rounding='stochastic' and no answer_feedback"
            )
        if self.adapt.method == "alq" and 0.0 not in self.format.levels:
            raise ValueError(f"adapt method='alq' with format {self.format.name!r}: expected a table with the level 0")

    def _check_feedback(self) -> None:
        if self.feedback.rule != "none" and self.format.kind == "raw":
            raise ValueError(
                f"feedback rule={self.feedback.rule!r} with format {self.format.name!r}: error feedback keeps what a "
                "block format lost; use feedback='none', or a format such as int8 or int4"
            )
        if self.feedback.storage == "int8":
            blocks = {fmt.block for fmt in (self.format, *self._later(answers=False)) if fmt.kind != "raw"}
            if len(blocks) > 1:
                raise ValueError(
                    f"feedback storage='int8' with formats of blocks {sorted(blocks)}: expected one block, which the "
                    "residual's scales have; give all formats the same block, or use storage='bf16'"
                )
        second = self.answer_feedback
        if (second.rule, second.storage) not in (("none", "fp32"), ("classic", "fp32")):
            raise ValueError(
                f"answer_feedback={second.rule!r} in {second.storage}: expected 'none' or 'classic' in fp32"
            )
        if second.rule != "none" and self.phases:
            raise ValueError(
                "answer_feedback with phases: the owners of chunks change with the format; drop one of them"
            )

    def _check_weights(self) -> None:
        if self.weights is not None:
            check_coding(self.weights, Coding(rounding=self.weights_rounding))
        if self.weights is None and (self.weights_difference or self.weights_rounding != "nearest"):
            raise ValueError("weights_difference or weights_rounding without weights: expected a format for weights")
        if self.weights is not None and self.weights_difference and self.weights.kind == "raw":
            raise ValueError(
                f"weights_difference with weights={self.weights.name!r}: a difference is worth sending in few bits; "
                "use int4 or int8, or drop weights_difference"
            )
        if self.weights_difference and self.secondary:
            raise ValueError(
                "weights_difference with secondary: the one keeps all parameters on every rank, the other only a "
                "host's share; drop one of them"
            )

    def __str__(self) -> str:
        rotation = f"rotation {self.rotation.size}{' with signs' * self.rotation.signs}" if self.rotation else ""
        rule = self.feedback
        feedback = "no feedback" if rule.rule == "none" else f"{rule.rule} feedback in {rule.storage}"
        extra = [
            f"{self.answer_feedback.rule} feedback of the answer" if self.answer_feedback.rule != "none" else "",
            f"schedule {self.schedule}" if self.schedule != "two_shot" else "",
            f"weights {self.weights}{' as differences' * self.weights_difference}" if self.weights else "",
            "secondary shards" if self.secondary else "",
            *(f"{each.pattern}: {each.format}" for each in self.rules),
            *(f"first {_until(phase)}: {phase.format}" for phase in self.phases),
        ]
        formats = f"{self.format} -> {self.answer_format}"
        parts = (f"{self.name}: {formats}", f"{self.rounding} rounding", rotation, feedback, *extra)
        return ", ".join(part for part in parts if part)

    @property
    def answer_format(self) -> Format:
        return self.answer or self.format

    @property
    def is_for_shards(self) -> bool:
        """It says something that only sharded training can do."""
        return self.weights is not None or self.secondary

    @property
    def unit(self) -> int:
        """Elements that must stay together: parameters start at multiples of this in what is encoded, in any phase."""
        formats = (self.format, self.answer_format, *self._later())
        return max(*(fmt.unit for fmt in formats), self.rotation.size if self.rotation else 1)

    def formats_of(self, name: str, shape: tuple[int, ...], numel: int, phase: int) -> tuple[Format, Format]:
        """Formats of both hops of a parameter while phase number `phase` holds. Raw ones: it travels uncoded."""
        rule = next((rule for rule in self.rules if rule.matches(name)), None)
        if rule is not None and rule.format.kind == "raw":
            return rule.format, rule.format
        if rule is None and self.format.kind != "raw" and self.exempt.covers(shape, numel):
            return self.exempt.format, self.exempt.format
        holds: Rule | Phase | None = self.phases[phase] if phase < len(self.phases) else rule
        if holds is None:
            return self.format, self.answer_format
        return holds.format, holds.answer or holds.format

    def exempts_weight(self, name: str, shape: tuple[int, ...], numel: int) -> bool:
        """Whether a parameter is gathered as it is although `weights` is set."""
        rule = next((rule for rule in self.rules if rule.matches(name)), None)
        return rule.format.kind == "raw" if rule is not None else self.exempt.covers(shape, numel)

    def _later(self, *, answers: bool = True) -> Iterator[Format]:
        """Formats of rules and phases, and the one inside hosts."""
        parts: tuple[Rule | Phase, ...] = (*self.rules, *self.phases)
        for each in parts:
            yield each.format
            if answers and each.answer is not None:
                yield each.answer
        if self.inside is not None and answers:
            yield self.inside


def _until(phase: Phase) -> str:
    ends = [f"{phase.steps} steps"] * bool(phase.steps) + [f"loss {phase.loss_below}"] * (phase.loss_below is not None)
    return " or ".join(ends)
