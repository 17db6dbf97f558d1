"""Rules: formats for parameters by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from commq.codecs.formats import Format


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Parameters with names that match travel in `format`; a raw format exempts them.

    The first rule that matches holds, and before the exemptions: a rule can also encode what would be exempt.
    """

    pattern: str
    """As in a shell: * any characters (dots, too), ? any one, [ab] one of them. Of the whole name."""
    format: Format
    answer: Format | None = None
    """Second hop; None: like the first."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ValueError(
                f"rule pattern={self.pattern!r}: expected a pattern of parameter names, such as '*.embed*'"
            )
        for name, value in (("format", self.format), ("answer", self.answer)):
            if not isinstance(value, Format) and not (name == "answer" and value is None):
                raise ValueError(f"rule {self.pattern!r}: {name}={value!r}, expected a commq.Format")

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)


def check_rules(rules: Sequence[Rule], names: Iterable[str]) -> None:
    """ValueError if a rule matches none of the parameters, with names that look like what was meant."""
    names = list(names)
    for rule in rules:
        if any(rule.matches(name) for name in names):
            continue
        near = get_close_matches(rule.pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(f"rule pattern={rule.pattern!r} matches no parameter; did you mean one of {', '.join(near)}?")
