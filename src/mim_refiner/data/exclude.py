"""Leave listed images out of a source: the file that ``doctor`` writes, or any list of names or numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mim_refiner.data.labels import printable
from mim_refiner.data.source_base import ImageSource, Selection
from mim_refiner.errors import DataError, did_you_mean
from mim_refiner.files import read_regular, reading


def list_lines(items: Iterable[tuple[int, str, str]]) -> bytes:
    """A line for each (number in the source, name, reason), as :func:`without_listed` reads them.

    The number comes first, so that a name may begin with anything, or occur twice.
    """
    lines = [f"{number}\t{name}\t{printable(reason)}\n" for number, name, reason in items]
    return "".join(lines).encode()


def without_listed(source: ImageSource, path: str | Path) -> Selection:
    """Return ``source`` without the images named in the text file ``path``.

    One image a line: number, name and reason with tabs between, as doctor and skipped_images.txt write them, or a name
    or a number alone (text after a tab is a comment). A name that is no longer at its number is looked for. Lines that
    begin with # and empty lines are ignored. Names of images that the source does not hold are allowed (a list may
    serve several sources), but at least one line must match. Raises DataError for an unreadable list, a list that
    matches nothing, or one that leaves nothing.
    """
    entries = _entries(Path(path).expanduser())
    rows: dict[str, list[int]] = {}
    for index in range(len(source)):
        rows.setdefault(source.name(index), []).append(index)
    dropped: set[int] = set()
    lost = 0
    for number, name in entries:
        if number is not None and number < len(source) and name in ("", source.name(number)):
            dropped.add(number)
        elif name in rows:
            dropped.update(rows[name])
        else:
            lost += 1
    if entries and not dropped:
        first = entries[0][1] or str(entries[0][0])
        raise DataError(
            f"{path}: none of its {len(entries)} lines names an image of {source.description} (first: "
            f"'{first}'{did_you_mean(first, list(rows)[:10_000])}); give the list that doctor wrote for this --data"
        )
    if len(dropped) == len(source):
        raise DataError(f"{path}: leaves none of the {len(source)} images of {source.description}; shorten the list")
    kept = np.array([index for index in range(len(source)) if index not in dropped], dtype=np.int64)
    missing = f", {lost} of its lines name none" if lost else ""
    description = f"{source.description} without {len(dropped)} of {Path(path).name}{missing}"
    return Selection(source, kept, description)


def _entries(path: Path) -> list[tuple[int | None, str]]:
    """(number or None, name or "") of every line."""
    with reading(path, "give the list of images to leave out that doctor wrote"):
        text = read_regular(path).decode("utf-8-sig", "surrogateescape")
    entries: list[tuple[int | None, str]] = []
    for line in text.split("\n"):
        cells = line.rstrip("\r").split("\t", 2)
        plain = cells[0].strip()
        if plain.isascii() and plain.isdecimal() and len(plain) < 19:
            entries.append((int(plain), printable(cells[1]) if len(cells) == 3 else ""))
        elif plain and not plain.startswith("#"):
            entries.append((None, printable(plain)))
    return entries
