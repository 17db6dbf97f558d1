"""Recipes on a command line: `int4`, `int4:rotation=32,feedback=none`, `int4:feedback.decay=0.9`, `mine.toml`."""

from __future__ import annotations

import json
from typing import Any

import commq


def read_recipe(text: str, **fields: Any) -> commq.Recipe:
    """A recipe of `commq.recipe`: a name or a file, and after a colon fields to replace.

    Values are numbers, true, false or words; a dot leads into a part: `exempt.min_numel=0`. fields: more of them.
    """
    name, _, rest = text.partition(":")
    overrides: dict[str, Any] = dict(fields)
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"recipe {text!r}: {pair!r}, expected name=value, such as int4:rotation=32,feedback=none")
        part, dot, field = key.partition(".")
        if dot:
            overrides.setdefault(part, {})[field] = _value(value)
        else:
            overrides[key] = _value(value)
    return commq.recipe(name, **overrides)


def split_recipes(text: str) -> list[str]:
    """Recipes separated by blanks or semicolons: their fields have the commas."""
    return text.replace(";", " ").split()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
