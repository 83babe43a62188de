"""``mim-refiner models``."""

from __future__ import annotations

import sys
from typing import Annotated, Any, TextIO

import typer

from mim_refiner.cli.common import JsonOption, show

_FILE_WIDTH = 400  # columns
NameArgument = Annotated[str | None, typer.Argument(metavar="NAME", help="Show this model in full.")]


def models(name: NameArgument = None, as_json: JsonOption = False) -> None:
    """List published encoders that --model takes by name, with source, size and licence."""
    from mim_refiner.commands.models import models as verb

    found = verb(name=name)
    if as_json or name is not None:
        show(found, as_json=as_json, file=sys.stdout)
    else:
        print_catalogue(found["models"], sys.stdout)


def print_catalogue(entries: list[dict[str, Any]], file: TextIO) -> None:
    """Print one line a model where the terminal is wide enough; a file or a pipe always is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=file, highlight=False, width=None if file.isatty() else _FILE_WIDTH)
    table = Table(box=None, pad_edge=False)
    columns = ("name", "family", "architecture", "image_size", "data", "size", "hash", "licence", "address")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for entry in entries:
        table.add_row(*(escape(str(entry[column])) for column in columns))
    console.print(table)
    console.print(f"{len(entries)} models; mim-refiner models NAME shows all of one", markup=False)
