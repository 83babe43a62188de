"""Images that are files: a folder (flat, class folders or nested) and a list file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mim_refiner.data.source_base import ImageSource, Labels, checked_labels, encode_labels, short_hash
from mim_refiner.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
_HEADER_NAMES = frozenset({"path", "image", "file", "filename", "image_path"})


class FileSource(ImageSource):
    """Image files below ``root``, read one by one; ``names`` are their paths relative to it."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Labels | None,
        class_names: tuple[str, ...] | None,
        description: str,
    ) -> None:
        self.root = root
        self.names = list(names)
        self.labels = labels
        self.class_names = class_names
        self.description = description

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()

    def name(self, index: int) -> str:
        return self.names[index]

    def fingerprint(self) -> str:
        sizes = [_size(self.root / name) for name in self.names]
        return short_hash(["files", *self.names, *sizes, "" if self.labels is None else self.labels])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def walk_files(root: Path) -> Iterator[str]:
    """Yield the relative paths of all files below ``root`` in sorted order, without hidden files and folders."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def folder_source(root: Path, names: Sequence[str]) -> FileSource:
    """Make a source of the image files ``names`` below ``root``.

    The sub-folders directly below the root are the classes when every image lies in one of them and there are at
    least two; with any other layout (flat, deeper, or a single sub-folder) there are no labels.
    """
    names = sorted(names)
    parts = [name.split("/") for name in names]
    labels, class_names = None, None
    if all(len(part) == 2 for part in parts) and len({part[0] for part in parts}) >= 2:
        class_names = tuple(sorted({part[0] for part in parts}))
        index = {name: position for position, name in enumerate(class_names)}
        labels = np.asarray([index[part[0]] for part in parts], dtype=np.int64)
    kind = "no labels" if class_names is None else f"{len(class_names)} class folders"
    return FileSource(root, names, labels, class_names, f"folder {root} ({len(names)} images, {kind})")


def list_source(path: Path) -> FileSource:
    """Read a .txt list (a path a line, a tab before a label) or a .csv list (``path[,label]``, header optional).

    Paths are relative to the list file. Blank lines are ignored, in .txt also those that start with ``#``.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list file ({error}); give a UTF-8 text file") from None
    lines = text.splitlines()
    if path.suffix.lower() == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if any(cell.strip() for cell in row)]
        if rows and rows[0][0].lower() in _HEADER_NAMES:
            rows = _select_columns(rows, path)
    else:
        rows = [line.strip().split("\t") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not rows:
        raise DataError(f"{path}: the list names no image; write one path per line")
    widths = {len(row) for row in rows}
    if not widths <= {1, 2} or len(widths) != 1:
        found = f"lines with {' and '.join(map(str, sorted(widths)))} columns"
        raise DataError(f"{path}: {found}; give every line a path, or every line a path and a label")
    labels, class_names = None, None
    if widths == {2}:
        raw, class_names = encode_labels([row[1] for row in rows])
        labels = checked_labels(raw, class_names, path)
    kind = "no labels" if labels is None else "with labels"
    description = f"list {path} ({len(rows)} images, {kind})"
    return FileSource(path.parent, [row[0] for row in rows], labels, class_names, description)


def _select_columns(rows: list[list[str]], path: Path) -> list[list[str]]:
    """Drop the header and keep the path and, where there is one, the label column."""
    header = [cell.lower() for cell in rows[0]]
    columns = [0] + ([header.index("label")] if "label" in header else [])
    short = [number for number, row in enumerate(rows, 1) if len(row) <= max(columns)]
    if short:
        raise DataError(f"{path}: row {short[0]} has no label; fill it in or remove the label column")
    return [[row[column] for column in columns] for row in rows[1:]]
