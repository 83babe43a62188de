"""Lists of images by name: published splits, and what is to be left out.

A split is a text file with an image name a line: so come the 1 % and 10 % of ImageNet-1K (SimCLR:
``n01440764_10043.JPEG``) and 1, 2 and 5 images a class (MSN). A name may lack its ending, or have folders, or a label.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mim_refiner.data.labels import printable, shown_names
from mim_refiner.data.source_base import ImageSource, Selection
from mim_refiner.data.source_files import PATH_NAMES, is_image_name
from mim_refiner.data.source_list import Row, cells_of, column_of, tables_of
from mim_refiner.errors import DataError, did_you_mean
from mim_refiner.files import read_regular, reading
from mim_refiner.reporting import number_of

_CLASS_AGAIN = re.compile(r"(n\d{8})(_\d+)_\1$")  # Hugging Face's ImageNet: n01440764_10043_n01440764
_SAMPLE = 200  # lines looked at to tell how the list is written


@dataclass(frozen=True)
class NameList:
    """A list and the images of a source that it names."""

    path: str
    rows: NDArray[np.int64]  # of the source, in order, each once
    listed: int  # names in the list
    missing: int  # names that the source does not hold
    first_missing: str = ""

    def __str__(self) -> str:
        lost = f"; {self.missing} not found (first: {self.first_missing})" if self.missing else ""
        return f"{self.path}: {number_of(self.listed, 'names')}, {self.listed - self.missing} found{lost}"


def match_names(source: ImageSource, path: str | Path) -> NameList:
    """The images of ``source`` that the list names.

    As many folders are compared as a name has, without those that all begin with and no image has (``train/`` where the
    source is that folder). Endings count where they are the same in both; else ``a.JPEG`` or ``a`` is ``a.png`` too.
    Blank lines and # lines are ignored. Of several columns, by tabs, commas, semicolons or blanks, the one whose names
    the source has is read; labels are the source's. Raises DataError for a list that is unreadable or empty, for names
    that fit several images, and where none is found or a class of the source has none.
    """
    images = source.file_names()
    folders = max(name.count("/") for name in images)
    listed = _names(Path(path).expanduser(), images, folders)
    found = _fitting(_below(listed, folders), images)
    if several := [(name, rows) for name, rows in zip(listed, found, strict=True) if len(rows) > 1]:
        fits = shown_names([images[row] for row in several[0][1]])
        raise DataError(
            f"{path}: {len(several)} of its {number_of(len(listed), 'names')} fit several images of "
            f"{source.description} (first: '{several[0][0]}' fits {fits}); write their folders before the names"
        )
    lost = [name for name, rows in zip(listed, found, strict=True) if not rows]
    if len(lost) == len(listed):
        raise DataError(
            f"{path}: none of its {number_of(len(listed), 'names')} is one of {source.description} (the list begins "
            f"with '{listed[0]}', the images with '{images[0]}'); give the images that it was made for"
        )
    rows = np.unique([each[0] for each in found if each])
    result = NameList(str(path), rows, len(listed), len(lost), *lost[:1])
    if source.classes is not None:
        absent = np.setdiff1d(np.arange(len(source.classes.names)), source.classes.numbers[rows])
        if len(absent):
            which = shown_names([source.classes.names[number] for number in absent])
            raise DataError(
                f"{result}: no image of {len(absent)} of the {number_of(len(source.classes.names), 'classes')} of "
                f"{source.description} ({which}); give the images that the list was made for"
            )
    return result


def _names(path: Path, images: Sequence[str], folders: int) -> list[str]:
    """The names, from the column that names most of the ``images``."""
    with reading(path, "give a text file with the name of an image a line"):
        text = read_regular(path).decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("is no text")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and line[0] != "#"]
    if not lines:
        raise DataError(f"{path}: names no image; write the name of an image a line")

    def plain(separator: str, rows: list[Row], column: int) -> list[str]:
        paths = (printable(cell).replace("\\", "/") for cell in column_of(rows, column) if cell)
        cells = [posixpath.normpath(path).lstrip("/") for path in paths]
        return cells[separator != "" and "".join(cells[:1]).lower() in PATH_NAMES :]

    tables = tables_of(lines[:: -(-len(lines) // _SAMPLE)], path)
    ways = [(separator, column, _below(plain(separator, rows, column), folders))
            for separator, rows, columns in tables for column in range(columns)]  # fmt: skip
    every = list({name for *_, names in ways for name in names})
    fit = {name for name, rows in zip(every, _fitting(every, images), strict=True) if rows}
    separator, column, _ = max(  # of equals the first: whole lines
        ways, key=lambda way: (sum(name in fit for name in way[2]), sum(map(is_image_name, way[2])))
    )
    return list(dict.fromkeys(plain(separator, cells_of(lines, separator, path), column)))


def _fitting(names: Sequence[str], images: Sequence[str]) -> list[list[int]]:
    """The images whose end each of ``names`` is: those of the same ending, where there are such."""
    wanted: dict[tuple[str, ...], list[int]] = {}
    for number, name in enumerate(names):
        wanted.setdefault(_key(name), []).append(number)
    lengths = sorted({len(key) for key in wanted})
    fits: list[tuple[list[int], list[int]]] = [([], []) for _ in names]  # rows of another ending, of the same
    for row, name in enumerate(images):
        parts, key = name.split("/"), _key(name)
        for length in lengths:
            for number in wanted.get(key[-length:], ()) if length <= len(key) else ():
                fits[number][names[number].split("/") == parts[-length:]].append(row)
    return [same or other for other, same in fits]


def _below(names: list[str], folders: int) -> list[str]:
    """``names`` without the first folders that all share, as long as all have more than ``folders``."""
    parts = [name.split("/") for name in names]
    while min(map(len, parts), default=0) > folders + 1 and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    return ["/".join(each) for each in parts]


def _key(name: str) -> tuple[str, ...]:
    """Folders and name without the ending of an image."""
    *folders, last = name.split("/")
    stem = os.path.splitext(last)[0] if is_image_name(last) else last
    return *folders, _CLASS_AGAIN.sub(r"\1\2", stem)


# --- images to leave out: the file that doctor writes, or any list of names or numbers


def list_lines(items: Iterable[tuple[int, str, str]]) -> bytes:
    """(number, name, reason) a line, for :func:`without_listed`; number first, as a name may be anything, or twice."""
    lines = [f"{number}\t{name}\t{printable(reason)}\n" for number, name, reason in items]
    return "".join(lines).encode()


def without_listed(source: ImageSource, path: str | Path) -> ImageSource:
    """Return ``source`` without the images named in the text file ``path``.

    A line: number, name and reason with tabs between, as doctor and skipped_images.txt write them, or a name or a
    number alone (text after a tab is a comment). A name no longer at its number is looked for; # lines and empty ones
    are ignored. Names that the source does not hold are allowed (a list may serve several sources), if at least one is
    there. Raises DataError for a list that is unreadable, matches nothing, or leaves nothing.
    """
    with reading(Path(path).expanduser(), "give the list of images to leave out that doctor wrote"):
        text = read_regular(Path(path).expanduser()).decode("utf-8-sig", "surrogateescape")
    rows: dict[str, list[int]] = {}
    for index in range(len(source)):
        rows.setdefault(source.name(index), []).append(index)
    named: list[str] = []
    dropped: set[int] = set()
    lost = 0
    for line in text.split("\n"):
        start, *rest = line.rstrip("\r").split("\t", 2)
        number, name = None, printable(start.strip())
        if not name or name.startswith("#"):
            continue
        if name.isascii() and name.isdecimal() and len(name) < 19:
            number, name = int(name), printable(rest[0]) if len(rest) == 2 else ""
        named.append(name or str(number))
        if number is not None and number < len(source) and name in ("", source.name(number)):
            dropped.add(number)
        elif name in rows:
            dropped.update(rows[name])
        else:
            lost += 1
    if not named:
        return source
    if not dropped:
        raise DataError(
            f"{path}: none of its {number_of(len(named), 'lines')} names an image of {source.description} (first: "
            f"'{named[0]}'{did_you_mean(named[0], list(rows)[:10_000])}); give the list that doctor wrote for this "
            "--data"
        )
    if len(dropped) == len(source):
        raise DataError(
            f"{path}: leaves none of the {number_of(len(source), 'images')} of {source.description}; shorten the list"
        )
    kept = np.array([index for index in range(len(source)) if index not in dropped], dtype=np.int64)
    missing = f", {lost} of its lines name none" if lost else ""
    return Selection(source, kept, f"{source.description} without {len(dropped)} of {Path(path).name}{missing}")
