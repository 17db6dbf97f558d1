"""Configuration files: the same names as on the command line, in TOML or YAML.

    # run.toml
    recipe = "int4"
    precision = "fp8"
    optimizer = "adamw8bit"
    no-tensorboard = true        # or tensorboard = false

    python -m commq.train --config run.toml --steps 500     # what the command line says wins

Names may have - or _, and may stand in tables, whose names mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from commq.recipes import read_mapping
from commq.train.config import Config

OPTION = "--config"


def expand(arguments: Sequence[str]) -> list[str]:
    """The command line with `--config FILE` replaced by the file's options, which come first.

    ValueError for an unknown name and for a file without a mapping; OSError for one that cannot be read.
    """
    rest: list[str] = []
    files: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            rest.append(argument)
        elif equals:
            files.append(value)
        else:
            found = next(given, None)
            if found is None:
                raise ValueError(f"{OPTION}: expected a TOML or YAML file after it")
            files.append(found)
    said = {_name(argument.partition("=")[0]) for argument in rest if argument.startswith("--")}
    options: list[str] = []
    for file in files:
        for name, value in _flat(read_mapping(Path(file))).items():
            name, value = _known(name, value, file)
            if name not in said:
                options += _option(name, value)
    return options + rest


def config_text(config: Config) -> str:
    """The whole configuration as TOML, for `--config`."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.flat().items() if value is not None]
    return "\n".join(["# python -m commq.train --config THIS FILE --out ANOTHER FOLDER", *lines]) + "\n"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return found


def _known(name: str, value: Any, file: str) -> tuple[str, Any]:
    """The field's name and its value: no-x = true is x = false."""
    names = list(Config().flat())
    plain = name.replace("-", "_")
    if plain.startswith("no_") and plain.removeprefix("no_") in names and isinstance(value, bool):
        plain, value = plain.removeprefix("no_"), not value
    if plain not in names:
        near = get_close_matches(plain, names, n=3) or names
        raise ValueError(f"{file}: {name!r} is no option; did you mean {' or '.join(near)}?")
    if isinstance(value, list | tuple):
        raise ValueError(f"{file}: {name} is a list, expected one value")
    return plain, value


def _name(option: str) -> str:
    plain = option.removeprefix("--").replace("-", "_")
    return plain.removeprefix("no_") if plain.removeprefix("no_") in Config().flat() else plain


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
