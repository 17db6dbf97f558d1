"""Plans of FSDP's two exchanges: from a recipe and shards to lanes and the integers of a message."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commq.attach.fsdp_lanes import Lane, make_lanes
from commq.attach.fsdp_layout import Shard
from commq.codecs.formats import Format, get_format
from commq.collectives.plan import RAW, Plan, Source, make_plan
from commq.collectives.route import inside_format
from commq.recipe import Recipe


def gradient_lanes(recipe: Recipe, shards: Sequence[Shard], phase: int, *, inside: bool = False) -> list[Lane]:
    """Lanes of gradients while phase number `phase` holds. inside: in the formats that stay inside hosts."""
    formats = [recipe.formats_of(s.name, s.shape, _numel(s), phase) for s in shards]
    if inside:
        formats = [(fmt, fmt) if fmt.kind == "raw" else (_inside(recipe, fmt),) * 2 for fmt, _ in formats]
    fill = recipe.rotation is not None or any("sign" in (fmt.kind, answer.kind) for fmt, answer in formats)
    return make_lanes(shards, formats, unit=recipe.unit, fill=fill)


def gradient_plan(recipe: Recipe, lanes: Sequence[Lane], dtype: torch.dtype, world_size: int, *, hops: bool) -> Plan:
    """A reduce-scatter of lanes of `dtype`; hops: in two hops."""
    return make_plan(
        tuple(
            Source(
                world_size * lane.numel,
                dtype,
                lane.format,
                lane.format,
                lane.unit,
                _inside(recipe, lane.format) if hops and lane.format.kind != "raw" else None,
            )
            for lane in lanes
        ),
        world_size=world_size,
    )


def weight_plan(
    recipe: Recipe, shards: Sequence[Shard], dtype: torch.dtype, world_size: int
) -> tuple[list[Lane], Plan]:
    """An all-gather of parameters of `dtype`; exempt ones travel as they are. Differences are float32."""
    assert recipe.weights is not None
    plain = get_format(RAW[dtype])
    formats = [plain if recipe.exempts_weight(s.name, s.shape, _numel(s)) else recipe.weights for s in shards]
    lanes = make_lanes(shards, [(fmt, fmt) for fmt in formats], unit=recipe.weights.unit, fill=False)
    coded = torch.float32 if recipe.weights_difference else dtype
    sources = tuple(
        Source(
            world_size * lane.numel, dtype if lane.format.kind == "raw" else coded, lane.format, lane.format, lane.unit
        )
        for lane in lanes
    )
    return lanes, make_plan(sources, world_size=world_size)


def _inside(recipe: Recipe, fmt: Format) -> Format:
    return recipe.inside or inside_format(fmt)


def _numel(shard: Shard) -> int:
    return torch.Size(shard.shape).numel()
