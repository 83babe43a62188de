"""The verb ``recipes``: which there are, all values of one, and what a key means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel

from mim_refiner.errors import InputError, did_you_mean
from mim_refiner.files import dotted
from mim_refiner.settings import nearest_key, ways
from mim_refiner.training.recipe import Phase, Recipe, RefineRecipe
from mim_refiner.training.recipes import PRETRAIN_RECIPES, REFINE_RECIPES

_FIELD = re.compile(r"    (\w+): .*?(?:  # (?:type: ignore\S*  # )?(.*))?")


def recipes(*, name: str | None = None, key: str | None = None) -> dict[str, Any]:
    """{"recipes": a record for each}, all settings of recipe ``name``, or of its ``key`` the value and its meaning.

    Without ``name`` a ``key`` is explained with its values in all recipes that have it. Raises InputError for a name
    or key that is not there.
    """
    made = {known: make() for known, make in (REFINE_RECIPES | PRETRAIN_RECIPES).items()}
    values = {known: dotted(recipe.model_dump(mode="json")) for known, recipe in made.items()}
    keys = [*dict.fromkeys(each for tree in values.values() for each in tree)]
    if name in keys:
        raise InputError(f"'{name}' is a setting and no recipe; use mim-refiner recipes --key {name}")
    if name is not None and name not in made:
        close = did_you_mean(name, [*made, *keys])
        raise InputError(f"no recipe '{name}'{close}; mim-refiner recipes lists them, --key KEY explains a setting")
    if key is not None:
        return _explained(key, made, values if name is None else {name: values[name]}, keys)
    if name is not None:
        return {"recipe": name, "command": _command(made[name]), "settings": made[name].model_dump(mode="json")}
    return {
        "recipes": [
            {
                "name": known,
                "command": _command(recipe),
                "batch_size": recipe.batch_size,
                "epochs": " + ".join(str(phase.epochs) for _, phase in recipe if isinstance(phase, Phase)),
                "expected": recipe.expected or "not measured",
            }
            for known, recipe in made.items()
        ]
    }


def _explained(
    key: str, made: Mapping[str, Recipe], values: Mapping[str, Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, Any]:
    found = {name: tree[key] for name, tree in values.items() if key in tree}
    if key in made:
        raise InputError(f"'{key}' is a recipe and no setting; use mim-refiner recipes {key}")
    if not found:
        where = f"recipe '{next(iter(values))}' has no such setting" if key in keys else f"no setting '{key}'"
        close = "" if key in keys else nearest_key(key, keys)
        raise InputError(f"{where}{close}; mim-refiner recipes NAME lists those of a recipe")
    owner: Any = type(made[next(iter(found))])
    *groups, name = key.split(".")
    for group in groups:
        owner = owner.model_fields[group].annotation
    part = {"part_of": " ".join((inspect.getdoc(owner) or "").split())} if groups else {}
    field = owner.model_fields[name]
    takes = " or ".join(ways(Annotated[field.annotation, None, *field.metadata]))
    return {"key": key, "meaning": meaning(owner, name), **part, "takes": takes, "values": found}


def meaning(recipe: type[BaseModel], key: str) -> str:
    """What the comment at the field says, in training/recipe.py."""
    name, _, rest = key.partition(".")
    if rest:
        inner: Any = recipe.model_fields[name].annotation
        return meaning(inner, rest)
    for owner in recipe.__mro__:
        above: list[str] = []
        for line in inspect.getsource(owner).splitlines() if name in vars(owner).get("__annotations__", {}) else ():
            field = _FIELD.fullmatch(line)
            if line.startswith("    # "):
                above.append(line[6:])
            elif field and field[1] == name:
                return " ".join([*above, field[2] or ""]).strip()
            else:
                above = []
    return ""


def _command(recipe: Recipe) -> str:
    return "refine" if isinstance(recipe, RefineRecipe) else "pretrain"
