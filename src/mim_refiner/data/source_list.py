"""A list of image files: a .txt, .csv or .tsv table whose separator, header and columns are found by looking at it."""

from __future__ import annotations

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mim_refiner.data.labels import LabelProblem, Labels, candidates, printable
from mim_refiner.data.source_base import LeftOut
from mim_refiner.data.source_files import PATH_NAMES, FileSource, is_image_name
from mim_refiner.errors import DataError
from mim_refiner.files import read_regular, reading
from mim_refiner.reporting import number_of

LIST_SUFFIXES = (".txt", ".csv", ".tsv")
SEPARATORS = ("", ",", ";", "\t", " ")
_SAMPLE = 50  # rows looked at to tell how the list is written
Row = tuple[int, list[str]]  # line number, cells


def list_source(path: Path) -> FileSource:
    """Read a list: a path a row, relative to the list, and a label where there is a second column or a header says so.

    Commas, semicolons, tabs or blanks between the columns, in any order, with or without a header, quotes or a
    byte-order mark. Blank lines are ignored, in .txt also those that begin with ``#``. A header's column ``label``
    holds the labels; without a header it is the other one of two columns.
    Raises DataError for what is no text or names no images, and for rows of odd length.
    """
    lines = _lines(path)
    separator, column, width, titled = _sniff(lines, path)
    rows = cells_of(lines, separator, path)
    header = [cell.lower() for cell in rows.pop(0)[1]] if titled else None
    odd = next(((line, len(cells)) for line, cells in rows if any(cells[width:])), None)
    if odd is not None:  # an unquoted separator in a name shifts the columns
        raise DataError(
            f"{path}: row {odd[0]} has {odd[1]} columns, the others {width}; put cells that hold the separator into "
            "double quotes"
        )
    names = column_of(rows, column)
    if "" in names:
        raise DataError(f"{path}: row {rows[names.index('')][0]} has no path; write one image a row")
    source = FileSource(path.parent, (_as_path(name, path.parent) for name in names))
    source.read_labels(lambda: _labels(rows, header, column, width))
    if more := [name for number, name in enumerate(header or ()) if number != column and name and name != "label"]:
        source.left_out = (LeftOut(len(more), "columns of the list", printable(more[0])),)
    kind = "no labels" if source.classes is None else "with labels"
    source.description = f"list {path} ({number_of(len(rows), 'images')}, {kind})"
    return source


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    with reading(path, "give a UTF-8 text file"):
        content = read_regular(path)
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16") if wide else content.decode("utf-8-sig", "surrogateescape")
        if "\0" in text:
            raise ValueError("it holds null bytes")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1)
             if line.strip() and not _comment(line.strip(), path)]  # fmt: skip
    if not lines:
        raise DataError(f"{path}: the list names no image; write one path per line")
    return lines


def _comment(line: str, path: Path) -> bool:
    if not line.startswith("#") or path.suffix.lower() != ".txt":
        return False
    starts = (line.split(separator)[0].strip() if separator else line for separator in SEPARATORS)
    return not any(os.path.isfile(path.parent / start) for start in starts)  # a file may be named so


def cells_of(lines: list[tuple[int, str]], separator: str, path: Path) -> list[Row]:
    """The cells of every numbered line; a blank as separator is the last one."""
    if separator in ("", " "):  # what is before the last blank may hold blanks
        split = (([line] if not separator else line.rsplit(None, 1)) for _, line in lines)
        return [(number, [cell.strip().strip('"') for cell in cells])
                for (number, _), cells in zip(lines, split, strict=True)]  # fmt: skip
    with reading(path, "write one path per line"):
        table = csv.reader((line for _, line in lines), delimiter=separator, skipinitialspace=True)
        rows = [(lines[table.line_num - 1][0], [cell.strip() for cell in cells]) for cells in table]
    return [(number, cells) for number, cells in rows if any(cells)]


def tables_of(lines: list[tuple[int, str]], path: Path) -> Iterator[tuple[str, list[Row], int]]:
    """(separator, rows, columns) of every way to read the lines as a table."""
    for separator in SEPARATORS:
        with contextlib.suppress(DataError):  # a quote that opens and never ends, for one
            rows = cells_of(lines, separator, path)
            yield separator, rows, max((len(cells) for _, cells in rows), default=1)


def column_of(rows: list[Row], number: int) -> list[str]:
    """The cells of a column, "" where a row has none."""
    return [cells[number] if len(cells) > number else "" for _, cells in rows]


def _sniff(lines: list[tuple[int, str]], path: Path) -> tuple[str, int, int, bool]:
    """Separator, column of the paths, number of columns, and whether there is a header: the way of reading the first
    rows by which most cells of one column are images: existing files, else by ending.

    Of equals the one with the fewest columns wins, so that names may hold blanks and commas.
    """
    ways: list[tuple[tuple[int, int, int], tuple[str, int, int, bool]]] = []
    for separator, rows, columns in tables_of(lines[:_SAMPLE], path):
        for column in range(columns) if columns > 1 or not separator else ():
            cells = column_of(rows, column)
            looks = [is_image_name(cell) for cell in cells]
            there = [bool(cell) and os.path.isfile(path.parent / _as_path(cell, path.parent)) for cell in cells]
            score = (sum(there), sum(looks) + (cells[0].lower() in PATH_NAMES), -columns)
            if 2 * max(sum(there), sum(looks)) >= len(cells):
                header = len(rows) > 1 and not there[0] and not looks[0]
                shown = rows[:1] if header else rows
                widths = Counter(max((n for n, cell in enumerate(row, 1) if cell), default=0) for _, row in shown)
                ways.append((score, (separator, column, widths.most_common(1)[0][0], header)))
    if not ways:
        raise DataError(
            f"{path}: its rows name no images (the first is '{printable(lines[0][1].strip())[:60]}'); "
            "write one path a row, or columns path,label"
        )
    return max(ways, key=lambda way: way[0])[1]


def _labels(rows: list[Row], header: list[str] | None, column: int, width: int) -> Labels:
    others = [number for number in range(width) if number != column]
    if header is not None:
        others = [number for number in others if header[number : number + 1] == ["label"]]
        if not others:
            hint = candidates(header) or "write a column 'label' for them"
            raise LabelProblem(f"the list has no column 'label' (found {', '.join(map(printable, header))}); {hint}")
    if not others:
        raise LabelProblem("the list has one column, of paths; add one for the labels")
    if len(others) > 1 and header is not None:
        raise LabelProblem(f"the header names {len(others)} columns 'label'; keep one")
    if len(others) > 1:
        raise LabelProblem(f"the list has {width} columns and no header; add one that names path and label")
    labels = column_of(rows, others[0])
    if sum(map(is_image_name, labels)) > len(labels) / 2:
        raise LabelProblem("the list has two columns of images and no labels; add a column 'label'")
    return Labels.of_texts(labels, where=lambda index: f"row {rows[index][0]}")


def _as_path(cell: str, folder: Path) -> str:
    """A path as this system writes it: a list from Windows has backslashes."""
    if "\\" in cell and os.sep == "/" and not os.path.exists(os.path.join(folder, cell)):
        return cell.replace("\\", "/")
    return cell
