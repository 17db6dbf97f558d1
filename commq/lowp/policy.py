"""Policies: which linear layers of a model are computed in which precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from commq.lowp.gemm import Precision, precision
from commq.lowp.recipes import PRECISIONS

ROLES: dict[str, tuple[str, ...]] = {
    "attention": ("*attn*", "*attention*", "*qkv", "*q_proj", "*k_proj", "*v_proj", "*o_proj", "*.out", "*out_proj"),
    "ffn": ("*mlp*", "*ffn*", "*feed_forward*", "*up_proj", "*gate_proj", "*down_proj", "*.fc1", "*.fc2", "*c_fc"),
    "head": ("head", "*.head", "*lm_head", "output", "*unembed*", "*embed_out"),
}
"""What rules may say in place of a pattern: the part of a transformer that a layer's name tells."""


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Layers with names that match are computed in `precision`."""

    pattern: str
    """As in a shell, of the whole name; or attention, ffn or head."""
    precision: Precision

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in ROLES.get(self.pattern, (self.pattern,)))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The precision of every linear layer: the first rule that matches, else `default`, unless it is kept as it is.

    Embeddings and norms are no linear layers: they always stay as they are.
    """

    name: str
    default: Precision
    rules: tuple[LayerRule, ...] = ()
    keep: tuple[str, ...] = ("head",)
    """Roles or patterns of layers that stay as they are unless a rule matches them; need not match anything."""
    first: int = 0
    """Transformer blocks at the start that stay as they are, whatever rules say."""
    last: int = 0
    """And at the end."""
    min_features: int | None = None
    """Layers with fewer inputs or outputs stay as they are. None: what was measured to gain, where GEMMs are real,
    else 0."""

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0 or (self.min_features or 0) < 0:
            raise ValueError(
                f"policy {self.name!r}: first={self.first}, last={self.last}, min_features={self.min_features}; "
                "expected numbers >= 0"
            )

    def plain(self) -> dict[str, Any]:
        """As plain data, for configurations and checkpoints; `policy` reads it."""
        return {
            "name": self.name,
            "default": self.default.plain(),
            "rules": {rule.pattern: rule.precision.plain() for rule in self.rules},
            "keep": list(self.keep),
            "first": self.first,
            "last": self.last,
            "min_features": self.min_features,
        }

    def choose(self, names: Sequence[str], blocks: Sequence[str]) -> dict[str, tuple[Precision, str]]:
        """Precision and reason of each linear layer. names: of all of them; blocks: prefixes of transformer blocks.

        ValueError if a rule matches no layer, with near names, or if no block lies between the first and the last.
        """
        check_rules(self.rules, names)
        if (self.first or self.last) and self.first + self.last >= len(blocks):
            raise ValueError(
                f"policy {self.name!r}: first={self.first} and last={self.last} of {len(blocks)} transformer blocks; "
                "expected blocks between them (a model's blocks are the alike children of its largest ModuleList)"
            )
        edges = [*blocks[: self.first], *(blocks[len(blocks) - self.last :] if self.last else ())]
        keep = [LayerRule(pattern=pattern, precision=Precision()) for pattern in self.keep]
        found = {}
        for name in names:
            if any(name.startswith(f"{edge}.") for edge in edges):
                found[name] = Precision(), "kept: first or last block"
                continue
            rule = next((rule for rule in self.rules if rule.matches(name)), None)
            kept = next((rule for rule in keep if rule.matches(name)), None)
            if rule is not None:
                found[name] = rule.precision, f"rule {rule.pattern}"
            elif kept is not None:
                found[name] = Precision(), f"kept: {kept.pattern}"
            else:
                found[name] = self.default, ""
        return found


def check_rules(rules: Sequence[LayerRule], names: Iterable[str]) -> None:
    """ValueError if a rule matches none of the layers, with names that look like what was meant."""
    names = list(names)
    for rule in rules:
        if any(rule.matches(name) for name in names):
            continue
        near = get_close_matches(rule.pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"rule pattern={rule.pattern!r} matches no linear layer; did you mean one of {', '.join(near)}?"
        )


def recipes() -> tuple[str, ...]:
    """Names of the policies that `policy` knows."""
    return tuple(PRECISIONS)


def policy(what: str | Mapping[str, Any] | Policy) -> Policy:
    """A Policy from the name of a recipe, or from plain data.

    Plain data: {"default": "fp8", "rules": {"blocks.0.*": "bf16", "ffn": {"forward": "int8/row", ...}}, "first": 1,
    "last": 1, "keep": ["head"], "min_features": 0}; precisions are names of recipes or texts of GEMMs (see gemm.py).
    The rules that a default has of its own (fp4-tpt: attention in FP8) follow the given ones. ValueError.
    """
    if isinstance(what, Policy):
        return what
    if isinstance(what, str):
        return Policy(name=what, default=_precision(what), rules=_RULES.get(what, ()))
    known = {field.name for field in fields(Policy)}
    if unknown := sorted(set(what) - known):
        raise ValueError(f"policy with {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
    if "default" not in what:
        raise ValueError("policy without 'default': expected the name of a recipe or texts of its GEMMs")
    default = what["default"]
    given: dict[str, Any] = {key: what[key] for key in ("first", "last", "min_features") if key in what}
    for key, value in given.items():
        if type(value) is not int and not (key == "min_features" and value is None):
            raise ValueError(f"policy with {key}={value!r}: expected a whole number")
    if "keep" in what:
        if not isinstance(what["keep"], list | tuple) or not all(isinstance(each, str) for each in what["keep"]):
            raise ValueError(f"policy with keep={what['keep']!r}: expected a list of roles or patterns")
        given["keep"] = tuple(what["keep"])
    entries = what.get("rules", {})
    if not isinstance(entries, Mapping):
        raise ValueError(f"policy with rules={entries!r}: expected a mapping of patterns to precisions")
    rules = tuple(LayerRule(pattern=key, precision=_precision(value)) for key, value in entries.items())
    if isinstance(default, str):
        rules += _RULES.get(default, ())
    name = what.get("name", default if isinstance(default, str) and not what.get("rules") else "custom")
    return Policy(name=name, default=_precision(default), rules=rules, **given)


def phases(name: str) -> tuple[tuple[float, Policy], ...]:
    """What a recipe asks for over a run: (fraction of the steps from which it holds, policy), the first from 0.0."""
    return ((0.0, policy(name)), *((start, policy(later)) for start, later in _PHASES.get(name, ())))


def _precision(what: str | Mapping[str, str | None]) -> Precision:
    if isinstance(what, str):
        if what not in PRECISIONS:
            near = get_close_matches(what, PRECISIONS, n=1) or [*PRECISIONS]
            raise ValueError(f"low-precision recipe {what!r} is unknown; expected {' or '.join(near)}")
        return PRECISIONS[what]
    if not isinstance(what, Mapping) or not all(isinstance(text, str | None) for text in what.values()):
        raise ValueError(f"precision {what!r}: expected the name of a recipe, or texts of its GEMMs by their names")
    return precision(what)


_RULES = {"fp4-tpt": (LayerRule(pattern="attention", precision=PRECISIONS["fp8-rowwise"]),)}
_PHASES = {"fp4-tpt": ((0.92, "bf16"),)}
"""Zhou et al. 2025: the target precision phase is the last part, 5 to 10 % of the steps."""
