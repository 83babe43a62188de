"""``mim-refiner doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TextIO

from rich.table import Table

from mim_refiner.cli.common import DataOption, DeviceOption, RecipeOption, option, verb
from mim_refiner.cli.tables import text_table, write_parts
from mim_refiner.report.tables import left_out_lines
from mim_refiner.reporting import number_of

EXAMPLES_SHOWN = 3  # names listed below each kind of finding


def print_findings(result: Mapping[str, Any], file: TextIO) -> None:
    """Print what was found, worst first, then classes, pixels and the model."""
    nothing = "nothing found: every image can be read, none is odd, none occurs twice"
    parts: list[Any] = [f"{result['data']}: {result['images_per_s']} images/s"]
    parts += [_table_of_kinds(result) if result["findings"] else nothing, *left_out_lines(result)]
    for title in ("pixels", "augmentations", "classes", "model"):
        if result.get(title):
            parts += [f"{title}:", *(line for fact in result[title].items() for line in _lines_of_fact(*fact))]
    parts.append(f"disk free: {result['disk_free_gb']} GB")
    if count := result["to_exclude"]:
        path = result.get("exclude_list") or "LIST, which --out DIR writes"
        parts.append(f"better left out: {number_of(count, 'images')} (refine --exclude {path})")
    write_parts(file, parts)


def _table_of_kinds(result: Mapping[str, Any]) -> Table:
    from mim_refiner.data.doctor import KINDS  # which needs torch

    rows = []
    for kind, count in result["counts"].items():
        listed, meaning = KINDS[kind]
        rows.append([kind, str(count), "yes" if listed else "no", meaning])
        told = [f"  {each['name']} {each['detail']}".rstrip() for each in result["findings"] if each["kind"] == kind]
        more = [f"  and {count - EXAMPLES_SHOWN} more"] if count > EXAMPLES_SHOWN else []
        rows += [["", "", "", line] for line in told[:EXAMPLES_SHOWN] + more]
    return text_table("", ("found", "images", "in the list", "what it means"), rows, names=4)


def _lines_of_fact(key: str, value: Any) -> list[str]:
    if key == "notes":
        return [f"  note: {note}" for note in value]
    if key == "coverage":
        value = f"{100 * value:.1f} % of the encoder's tensors"
    return [f"  {key.replace('_', ' ')}: {' '.join(map(str, value)) if isinstance(value, list) else value}"]


@verb(print_findings)
def doctor(
    data: DataOption,
    model: Annotated[str | None, option("SRC", "Encoder to check too: coverage, memory, disk, time.")] = None,
    test: Annotated[str | None, option("SRC", "Test images: none of them may be among --data.")] = None,
    out: Annotated[str | None, option("DIR", "Folder for doctor.json and exclude.txt (for refine --exclude).")] = None,
    recipe: RecipeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Check images (and an encoder) before a run: damaged, odd, duplicate and leaked images, classes, cost."""
