"""Open any supported image source from one text: a folder, a list, parquet, NumPy arrays, several of them, a slice."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from mim_refiner.data.source_arrays import ArraySource
from mim_refiner.data.source_base import ConcatSource, ImageSource, SlicedSource
from mim_refiner.data.source_files import IMAGE_SUFFIXES, folder_source, list_source, walk_files
from mim_refiner.data.source_parquet import ParquetSource
from mim_refiner.errors import DataError, nearest_path

__all__ = ["ImageSource", "open_source"]

_SLICE = re.compile(r"^(?P<path>.+?)(?P<text>\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d*))?\])$")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|val|valid|validation)(?=[^a-z]|$)")
_KINDS = "a folder, .txt, .csv, .parquet, .npz or .npy"


def open_source(spec: str | os.PathLike[str]) -> ImageSource:
    """Open ``spec`` as an image source.

    A folder of images or of parquet files, a .txt/.csv list, .parquet, .npz or .npy; a glob pattern or a
    comma-separated list joins several; ``[start:stop:step]`` at the very end selects a slice of the whole, e.g.
    ``train-*.parquet[:1000]``.

    Raises DataError (one line) when it is missing, empty, of an unknown kind, or damaged.
    """
    text = os.fspath(spec).strip()
    if not text:
        raise DataError(f"no data source given; name {_KINDS}")
    match = None if os.path.exists(text) else _SLICE.match(text)
    if match is None:
        return _open_whole(text)
    start, stop, step = (int(match[key]) if match[key] else None for key in ("start", "stop", "step"))
    if step == 0:
        raise DataError(f"{text}: the step of a slice cannot be 0; use 1 or more")
    return SlicedSource(_open_whole(match["path"]), slice(start, stop, step), match["text"])


def _open_whole(text: str) -> ImageSource:
    path = Path(text).expanduser()
    if path.exists():
        return _open_path(path)
    paths: list[Path] = []
    for part in (piece.strip() for piece in text.split(",")):
        expanded = os.path.expanduser(part)
        found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded))
        if not part or not found:
            advice = nearest_path(part) or "; check the path given as data"
            raise DataError(f"{part or text}: no such file or folder{advice}")
        paths += [Path(name) for name in found]
    if len(paths) == 1:
        return _open_path(paths[0])
    return ConcatSource([_open_path(path) for path in paths], f"{len(paths)} sources {text}")


def _open_path(path: Path) -> ImageSource:
    if path.is_dir():
        return _open_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetSource(path)
    if suffix in (".npz", ".npy"):
        return ArraySource(path)
    if suffix in (".txt", ".csv"):
        return list_source(path)
    if suffix in IMAGE_SUFFIXES:
        return folder_source(path.parent, [path.name])
    raise DataError(f"{path}: unknown kind of data '{suffix or path.name}'; give {_KINDS}")


def _open_folder(root: Path) -> ImageSource:
    names = list(walk_files(root))
    images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if images:
        return folder_source(root, images)
    tables = [name for name in names if name.lower().endswith(".parquet")]
    if not tables:
        found = f"none of its {len(names)} files is an image" if names else "the folder is empty"
        raise DataError(f"{root}: {found}; give a folder with .jpg, .png, .webp, ... or .parquet files")
    splits = {found[1] for found in (_SPLIT.search(name.lower()) for name in tables) if found}
    if len(splits) > 1:
        example = f"{root}/*{min(splits, key=len)}*.parquet"
        found = ", ".join(sorted(splits))
        raise DataError(f"{root}: holds the splits {found}; choose one with a pattern like {example}")
    tables_text = f"folder {root} of {len(tables)} parquet files"
    return ConcatSource([ParquetSource(root / name) for name in tables], tables_text)
