"""Agreement: the recipe that all ranks attach by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from commq.collectives.transport import Transport, check_equal
from commq.recipe import Recipe
from commq.recipes import recipe as get_recipe


def agree_on_recipe(recipe: object, transports: Iterable[Transport], check: Callable[[Recipe], None]) -> Recipe:
    """A Recipe, or what `commq.recipe` makes of a name, a dict or a file; the same on all ranks, which all call it.

    check: raises ValueError for recipes that do not suit. An error of one rank, or a difference between ranks, raises
    OSError, TypeError or ValueError on every rank.
    """
    failure: Exception | None = None
    try:
        resolved = get_recipe(recipe) if isinstance(recipe, str | Path | Mapping) else recipe
        if not isinstance(resolved, Recipe):
            raise TypeError(f"recipe is a {type(recipe).__name__}, expected a commq.Recipe, a name, a dict or a file")
        check(resolved)
    except (OSError, TypeError, ValueError) as error:
        failure = error
    for transport in transports:
        check_equal("the recipe", str(failure) if failure else repr(resolved), transport)
    if failure:
        raise failure
    assert isinstance(resolved, Recipe)
    return resolved
