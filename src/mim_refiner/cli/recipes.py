"""``mim-refiner recipes``."""

from __future__ import annotations

from typing import Annotated

import typer

from mim_refiner.cli.common import JsonOption, show

RecipeArgument = Annotated[str | None, typer.Argument(metavar="NAME", help="Show all settings of this recipe.")]
KeyOption = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Explain this setting.")]


def recipes(name: RecipeArgument = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """List the recipes, print one (as YAML, to change and give to --recipe), or explain a setting."""
    from mim_refiner.commands.recipes import recipes as verb

    found = verb(name=name, key=key)
    if as_json or "settings" not in found:
        show(found, as_json=as_json)
    else:
        import yaml

        print(yaml.safe_dump(found["settings"], sort_keys=False), end="")
