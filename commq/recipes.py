"""Recipes with names, and recipes from dicts and files.

Defaults follow measurements; the note beside each recipe says which. Those of published methods have their name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from commq.codecs.formats import Format, get_format
from commq.codecs.rotation import Rotation
from commq.feedback.rule import Feedback
from commq.policy.exempt import Exempt
from commq.policy.levels import Adapt
from commq.policy.phase import Phase
from commq.policy.rule import Rule
from commq.policy.widths import Widths
from commq.recipe import Recipe

_TLQ_HS: dict[str, Any] = {
    "format": get_format("int4"),
    "inside": get_format("int8"),
    "schedule": "two_hop",
    "rounding": "stochastic",
    "rotation": Rotation(size=32),
}

_RECIPES = {
    r.name: r
    for r in (
        Recipe(name="fp32", format=get_format("fp32")),
        Recipe(name="bf16", format=get_format("bf16")),
        Recipe(name="fp8", format=get_format("fp8_e4m3")),
        Recipe(name="int8", format=get_format("int8")),
        # Scales in bf16, rounded up: 3 % fewer bytes than with fp32. Averaged feedback costs nothing in loss at 4 bits
        # and removes the bias of rounding; classic costs 1 %.
        Recipe(name="int4", format=get_format("int4", scale="bf16"), feedback=Feedback(rule="averaged")),
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
        # Published methods, for comparison. QSGD (Alistarh et al. 2017): unbiased, no memory.
        Recipe(name="qsgd", format=get_format("int4"), rounding="stochastic"),
        # LoCo (Xie et al. 2024): averaged feedback, kept in 8 bits, zeroed every 512 steps; one hop is quantized.
        Recipe(
            name="loco",
            format=get_format("int4"),
            answer=get_format("bf16"),
            feedback=Feedback(rule="averaged", decay=0.8, reset_every=512, storage="int8"),
        ),
        # SDP4Bit's gradients (Jia et al. 2024), TLq-HS: rotated, 8 bits inside a host and 4 between, unbiased.
        Recipe(name="tlq-hs", **_TLQ_HS),
        # The same between hosts: 4 bits inside a host, with LoCo's feedback, and between them. DeepSpeed's LoCo feeds
        # back the encoding between hosts as well; here that hop's own loss (of sums over a host's ranks) is not kept.
        Recipe(
            name="loco-two-hop",
            format=get_format("int4"),
            inside=get_format("int4"),
            answer=get_format("bf16"),
            schedule="two_hop",
            feedback=Feedback(rule="averaged", decay=0.8, reset_every=512, storage="int8"),
        ),
        # 1-bit SGD (Seide et al. 2014): signs, decoded as the mean of a block's non-negative numbers or that of its
        # negative ones, classic feedback on both hops. Differs: blocks of 256 in place of columns; no double buffering.
        Recipe(
            name="onebit-sgd",
            format=get_format("means"),
            feedback=Feedback(rule="classic"),
            answer_feedback=Feedback(rule="classic"),
        ),
        # DoubleSqueeze (Tang et al. 2019): one bit and classic feedback on both hops.
        Recipe(
            name="doublesqueeze",
            format=get_format("sign"),
            feedback=Feedback(rule="classic"),
            answer_feedback=Feedback(rule="classic"),
        ),
        # EF-SignSGD (Karimireddy et al. 2019), across ranks: signs with feedback, and their mean in 8 bits.
        Recipe(
            name="ef-signsgd", format=get_format("sign"), answer=get_format("int8"), feedback=Feedback(rule="classic")
        ),
        # THC (Li et al. 2024): rotated, levels of a table added as integers, classic feedback.
        Recipe(
            name="thc",
            format=get_format("int4", block=1024),
            schedule="thc",
            rounding="stochastic",
            rotation=Rotation(size=1024, signs=True),
            feedback=Feedback(rule="classic"),
        ),
        # EDEN (Vargaftik et al. 2022; at 1 bit DRIVE, 2021): rotated, the nearest of levels that suit a normal variable
        # and a scale that makes the whole unbiased over the signs, which are new each step. Needs no memory; both hops.
        # Signs cost most on the second hop, so 1 bit is answered in 2. Differs: runs of 1024, one scale each.
        *(
            Recipe(
                name=f"eden{bits}",
                format=get_format(f"eden{bits}"),
                answer=get_format(f"eden{max(bits, 2)}"),
                rotation=Rotation(size=1024, signs=True),
            )
            for bits in (1, 2, 3, 4)
        ),
        # The same levels with the scale of least error, and averaged feedback for what that shrinks.
        Recipe(
            name="eden2-feedback",
            format=get_format("lloyd2"),
            answer=get_format("eden2"),
            rotation=Rotation(size=1024, signs=True),
            feedback=Feedback(rule="averaged"),
        ),
        # ALQ and AMQ (Faghri et al. 2020): 3 bits, unbiased, levels that follow the gradients. See policy/levels.py.
        *(
            Recipe(
                name=f"{method}3",
                format=get_format(f"{method}3"),
                rounding="stochastic",
                adapt=Adapt(method=method),
            )
            for method in ("alq", "amq")
        ),
        # Double Quantization (Yu et al. 2019): both directions, and as many bits as the gradients ask for. See
        # policy/widths.py. Parameters travel once, in DDP's own broadcast; the answer has a fixed width.
        Recipe(
            name="double-quantization",
            format=get_format("eden2"),
            answer=get_format("eden4"),
            rotation=Rotation(size=1024, signs=True),
            adapt=Widths(),
        ),
        # 8-bit approximations (Dettmers 2015): a tree of levels, finer near 0; nearest, no memory. Top: 1, not 0.993.
        Recipe(name="dynamic8", format=get_format("dynamic8")),
        # Marsit (Wu et al. 2022): a ring of single bits, unbiased.
        Recipe(name="marsit", format=get_format("sign"), schedule="one_bit"),
        # Sharded training. Gradients without memory: rotated, unbiased, 8 bits inside a host and 4 between.
        Recipe(name="full-shard", **_TLQ_HS, weights=get_format("int8")),
        # SDP4Bit (Jia et al. 2024): parameters stay on every rank, so 4 bits do for what changed.
        Recipe(name="sdp4bit", **_TLQ_HS, weights=get_format("int4", block=2048), weights_difference=True),
        # Shards inside a host, and between hosts an all-reduce that keeps what it loses; weights never leave a host.
        Recipe(
            name="hybrid-shard",
            format=get_format("int4"),
            inside=get_format("int8"),
            schedule="two_hop",
            feedback=Feedback(rule="averaged"),
        ),
        # ZeRO++ (Wang et al. 2023): qwZ, qgZ and hpZ.
        Recipe(
            name="zero++",
            format=get_format("int4"),
            inside=get_format("int4"),
            schedule="two_hop",
            weights=get_format("int8"),
            secondary=True,
        ),
        # QSDP (Markov et al. 2023): unbiased 8 bits for both; stochastic rounding stands for its random shift.
        Recipe(
            name="qsdp",
            format=get_format("int8", block=1024),
            rounding="stochastic",
            weights=get_format("int8", block=1024),
            weights_rounding="stochastic",
        ),
    )
}


def recipes() -> list[str]:
    """Names that `recipe` knows."""
    return list(_RECIPES)


def recipe(name: str | Path | Mapping[str, Any], **overrides: Any) -> Recipe:
    """A recipe by name, from a dict or from a TOML or YAML file, with some of its fields replaced.

    name: one of `recipes()`; or a mapping, or a file that holds one, of fields, with "name" for the recipe to start
    from. Formats may be given by name ("int4", or with block and scale "int4/64:bf16"), a rotation by its size,
    feedback by its rule or as a mapping; rules and phases as lists of mappings. `block=` sets the block of the formats
    that have one. `warm_up=n` stands for a first phase of n steps in bf16.
    Examples: recipe("int4", block=64), recipe("int4", feedback="none", rotation=32), recipe("recipe.toml"),
    recipe({"name": "int4", "rules": [{"pattern": "*.wte.*", "format": "int8"}]}).
    Raises ValueError for unknown names and for combinations that cannot be, OSError for files that cannot be read.
    """
    if isinstance(name, Mapping):
        return recipe(**{"name": "int4", **name, **overrides})
    if isinstance(name, Path) or Path(name).suffix in (".toml", ".yaml", ".yml"):
        return recipe(read_mapping(Path(name)), **overrides)
    if name not in _RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; expected one of {', '.join(_RECIPES)}, or a .toml or .yaml file")
    base = _RECIPES[name]
    known = {f.name for f in fields(Recipe)} - {"name"} | {"block", "warm_up"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"recipe {name!r} has no {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    block, warm_up = overrides.pop("block", None), overrides.pop("warm_up", 0)
    for key in ("format", "answer", "inside", "weights"):
        if key in overrides:
            overrides[key] = _format(overrides[key])
    if isinstance(overrides.get("rotation"), int):
        overrides["rotation"] = Rotation(size=overrides["rotation"])
    for key, kind in (("rotation", Rotation), ("exempt", Exempt), ("adapt", type(base.adapt) if base.adapt else Adapt)):
        if isinstance(overrides.get(key), Mapping):
            overrides[key] = _make(kind, overrides[key], key)
    for key in ("feedback", "answer_feedback"):
        if isinstance(overrides.get(key), str):
            overrides[key] = replace(getattr(base, key), rule=overrides[key])
        elif isinstance(overrides.get(key), Mapping):
            overrides[key] = _make(Feedback, overrides[key], key)
    for key, part in (("rules", Rule), ("phases", Phase)):
        if isinstance(overrides.get(key), list | tuple):
            values = overrides[key]
            overrides[key] = tuple(_make(part, each, key) if isinstance(each, Mapping) else each for each in values)
    if warm_up:
        overrides["phases"] = (Phase(format=get_format("bf16"), steps=warm_up), *overrides.get("phases", base.phases))
    if block is not None:
        overrides |= _reblocked(
            name, block, {k: overrides.get(k, getattr(base, k)) for k in ("format", "answer", "inside")}
        )
    return replace(base, **overrides) if overrides else base


def _format(value: Any) -> Any:
    """A format from its name, or from how a Format prints: int4, int4/64, int4/64:bf16."""
    if not isinstance(value, str):
        return value
    name, _, rest = value.partition("/")
    block, _, scale = rest.partition(":")
    if rest and not block.isdigit():
        raise ValueError(f"format {value!r}: expected a name, or name/block or name/block:scale, such as int4/64:bf16")
    return get_format(name, block=int(block) if block else None, scale=scale or None)  # type: ignore[arg-type]


def _reblocked(name: str, block: Any, formats: dict[str, Format | None]) -> dict[str, Format]:
    blocked = {key: fmt for key, fmt in formats.items() if fmt is not None and fmt.kind != "raw"}
    if not blocked:
        raise ValueError(f"block={block} for recipe {name!r}: its formats are raw and have no blocks; drop block=")
    return {key: get_format(fmt.name, block=block, scale=fmt.scale) for key, fmt in blocked.items()}


def _make(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A part of a recipe from a mapping."""
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where} has no {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    try:
        return kind(**{key: _format(value) if key in ("format", "answer") else value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}; found {dict(values)}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a TOML or YAML file. ValueError for what is none, OSError for a file that cannot be read."""
    text = path.read_text()
    if path.suffix == ".toml":
        try:
            import tomllib
        except ImportError:
            raise ValueError(f"{path}: TOML needs Python 3.11; write YAML, or use 3.11") from None
        try:
            found: Any = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
    elif path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise ValueError(f"{path}: YAML needs PyYAML; pip install pyyaml, or write TOML") from None
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {error}") from None
    else:
        raise ValueError(f"{path}: expected a file that ends in .toml, .yaml or .yml")
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected a mapping of names to values")
    return found
