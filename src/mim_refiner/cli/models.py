"""``mim-refiner models``."""

from __future__ import annotations

import sys
from typing import Annotated, Any, TextIO

import typer

from mim_refiner.cli.common import JsonOption, show

NameArgument = Annotated[str | None, typer.Argument(metavar="NAME", help="Show this model in full.")]


def models(name: NameArgument = None, as_json: JsonOption = False) -> None:
    """List published encoders that --model takes by name, with what they learned from and their licence."""
    from mim_refiner.commands.models import models as verb

    found = verb(name=name)
    if name is None and not as_json:
        print_catalogue(found["models"], sys.stdout)
        return
    if not as_json:  # a size or hash that nobody states is not shown
        found = {key: value for key, value in found.items() if value != "unknown" or key == "licence"}
    show(found, as_json=as_json)


def print_catalogue(entries: list[dict[str, Any]], file: TextIO) -> None:
    """Print what a choice needs, a model a line; NAME shows the rest."""
    from rich.markup import escape
    from rich.table import Table

    from mim_refiner.cli.tables import console_for

    console, table = console_for(file), Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True, min_width=max(len(str(entry["name"])) for entry in entries))
    for column in ("architecture", "px", "images", "licence"):
        table.add_column(column)
    for entry in entries:
        licence = str(entry["licence"]).partition(" (")[0].replace("unknown", "not stated")
        row = (entry["name"], entry["architecture"], entry["image_size"], entry["data"], licence)
        table.add_row(*(escape(str(each)) for each in row))
    console.print(table)
    console.print(f"{len(entries)} models; mim-refiner models NAME shows source, size and hash of one", markup=False)
