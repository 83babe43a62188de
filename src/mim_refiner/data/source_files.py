"""Images that are files: a folder (flat, class folders or nested) and a list file."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mim_refiner.data.packed import PackedStrings
from mim_refiner.data.source_base import ImageSource, Labels, checked_labels, encode_labels, short_hash
from mim_refiner.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
ARRAY_SUFFIX = ".npy"  # one image an array, in a folder
_HEADER_NAMES = frozenset({"path", "image", "file", "filename", "image_path"})


class FileSource(ImageSource):
    """Image files below ``root``, read one by one; ``names`` are their paths relative to it."""

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        labels: Labels | None,
        class_names: tuple[str, ...] | None,
        description: str,
    ) -> None:
        self.root = root
        self.names = PackedStrings.pack(names)
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
        sizes = (_size(self.root / name) for name in self.names)
        labels = "" if self.labels is None else self.labels
        return short_hash(itertools.chain(["files"], self.names, sizes, [labels]))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def walk_files(root: Path) -> Iterator[str]:
    """Yield the relative paths of all files below ``root`` in sorted order, without hidden files and folders.

    Folders that are links are followed, except back into a folder above them.
    """
    yield from _walk(str(root), "", set())


def _walk(folder: str, prefix: str, above: set[tuple[int, int]]) -> Iterator[str]:
    facts = os.stat(folder)
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    try:
        with os.scandir(folder) as entries:
            # "a/" as a folder's name: the order is then that of the whole paths.
            found = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
    except OSError:  # a folder that may not be read; os.walk leaves it out too
        return
    for name in found:
        if name.startswith("."):
            continue
        if name.endswith("/"):
            yield from _walk(os.path.join(folder, name[:-1]), prefix + name, above | {here})
        else:
            yield prefix + name


def folder_source(root: Path, names: Iterable[str]) -> FileSource:
    """Make a source of the image files ``names`` below ``root``, which come sorted.

    The sub-folders directly below the root are the classes when every image lies in one of them and there are at
    least two; with any other layout (flat, deeper, or a single sub-folder) there are no labels.
    """
    packed = PackedStrings.pack(names)
    index: dict[str, int] = {}
    numbers = np.empty(len(packed), dtype=np.int64)
    for position, name in enumerate(packed):
        folder, _, rest = name.partition("/")
        if not rest or "/" in rest:
            index.clear()
            break
        numbers[position] = index.setdefault(folder, len(index))
    labels, class_names = None, None
    if len(index) >= 2:
        class_names = tuple(sorted(index))
        order = np.empty(len(index), dtype=np.int64)
        order[[index[name] for name in class_names]] = np.arange(len(index))
        labels = order[numbers]
    kind = "no labels" if class_names is None else f"{len(class_names)} class folders"
    return FileSource(root, packed, labels, class_names, f"folder {root} ({len(packed)} images, {kind})")


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
