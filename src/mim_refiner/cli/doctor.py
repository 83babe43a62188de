"""``mim-refiner doctor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from mim_refiner.cli.common import DataOption, DeviceOption, RecipeOption, verb

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES_SHOWN = 3  # names listed below each kind of finding


def print_findings(result: Mapping[str, Any], file: TextIO) -> None:
    """Print what was found, worst first, then classes, pixels and the model."""
    from rich.console import Console

    console = Console(file=file, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{result['data']}: {result['images_per_s']} images/s")
    if result["findings"]:
        _print_kinds(console, result["counts"], result["findings"])
    else:
        console.print("nothing found: every image can be read, none is odd, none occurs twice")
    for each in result["left_out"]:
        console.print(f"left out: {each['count']} {each['what']} (first: {each['first']})")
    if result.get("no_labels"):
        console.print(f"no labels: {result['no_labels']}")
    for title in ("pixels", "augmentations", "classes", "model"):
        if result.get(title):
            console.print(f"{title}:")
            for key, value in result[title].items():
                _print_fact(console, key, value)
    console.print(f"disk free: {result['disk_free_gb']} GB")
    if count := result["to_exclude"]:
        path, unlisted = result.get("exclude_list"), f"{count} images are better left out"
        unlisted += "; --out DIR writes the list for refine --exclude"
        console.print(f"leave {count} images out with: refine --exclude {path}" if path else unlisted)


def _print_kinds(console: Console, counts: Mapping[str, int], findings: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from mim_refiner.data.doctor import KINDS

    table = Table(box=None, pad_edge=False)
    for column in ("found", "images", "in the list", "what it means"):
        table.add_column(column)
    for kind, count in counts.items():
        listed, meaning = KINDS[kind]
        table.add_row(kind, str(count), "yes" if listed else "no", meaning)
        examples = [finding for finding in findings if finding["kind"] == kind]
        for finding in examples[:EXAMPLES_SHOWN]:
            table.add_row("", "", "", f"  {finding['name']} {finding['detail']}".rstrip())
        if count > EXAMPLES_SHOWN:
            table.add_row("", "", "", f"  and {count - EXAMPLES_SHOWN} more")
    console.print(table)


def _print_fact(console: Console, key: str, value: Any) -> None:
    if key == "notes":
        for note in value:
            console.print(f"  note: {note}")
        return
    if key == "coverage":
        value = f"{100 * value:.1f} % of the encoder's tensors"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    console.print(f"  {key.replace('_', ' ')}: {text}")


@verb(print_findings)
def doctor(
    data: DataOption,
    model: Annotated[
        str | None, typer.Option(metavar="SRC", help="Encoder to check too: coverage, memory, disk, time.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="SRC", help="Test images: none of them may be among --data.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for doctor.json and exclude.txt (for refine --exclude).")
    ] = None,
    recipe: RecipeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Check images (and an encoder) before a run: damaged, odd, duplicate and leaked images, classes, cost."""
