"""Open any supported image source from one text: a folder, a list, parquet, tar shards, NumPy arrays, a data set of the
hub, several of them, a split, a slice.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mim_refiner.data.source_arrays import ArraySource
from mim_refiner.data.source_base import ConcatSource, ImageSource, SlicedSource
from mim_refiner.data.source_files import ARRAY_SUFFIX, IMAGE_SUFFIXES, folder_source, list_source, walk_files
from mim_refiner.data.source_hub import PREFIX, download_dataset
from mim_refiner.data.source_parquet import ParquetSource
from mim_refiner.data.source_tar import TarSource
from mim_refiner.errors import DataError, nearest_path

__all__ = ["ImageSource", "open_source"]

_SLICE = re.compile(r"^(?P<path>.+?)(?P<text>\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d*))?\])$")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|val|valid|validation)(?=[^a-z]|$)")
_BRACES = re.compile(r"\{([^{}]+)\}")
_KINDS = "a folder, .txt, .csv, .parquet, .tar, .npz, .npy or hf:owner/name"
_SAME = {"val": "validation", "valid": "validation", "dev": "validation"}
_TABLES = (".parquet", ".tar")


def open_source(spec: str | os.PathLike[str]) -> ImageSource:
    """Open ``spec`` as an image source.

    A folder of images, of parquet files or of tar shards, a .txt/.csv list, .parquet, .tar, .npz or .npy, or
    ``hf:owner/name``; a glob pattern, ``{000..127}`` or a comma-separated list joins several. ``#train`` chooses the
    part of a folder or hub data set that is named so, and ``[start:stop:step]`` at the very end selects a slice of the
    whole, e.g. ``train-*.parquet[:1000]`` or ``hf:owner/name#test[:500]``.

    Raises DataError (one line) when it is missing, empty, of an unknown kind, or damaged.
    """
    text = os.fspath(spec).strip()
    if not text:
        raise DataError(f"no data source given; name {_KINDS}")
    if "\0" in text:
        raise DataError(f"{ascii(text)[:80]}: a path has no null characters; name {_KINDS}")
    match = None if os.path.exists(text) else _SLICE.match(text)
    if match is None:
        return _open_part(text)
    start, stop, step = (int(match[key]) if match[key] else None for key in ("start", "stop", "step"))
    if step == 0:
        raise DataError(f"{text}: the step of a slice cannot be 0; use 1 or more")
    return SlicedSource(_open_part(match["path"]), slice(start, stop, step), match["text"])


def _open_part(text: str) -> ImageSource:
    """Take the split off, then open the rest."""
    path, mark, split = text.rpartition("#")
    if not mark or os.path.exists(os.path.expanduser(text)):
        path, split = text, ""
    if mark and path != text and not (path and split):
        raise DataError(f"{text}: write the split behind the data, as in folder#train")
    if path.startswith(PREFIX):
        folder = download_dataset(path, split or None)
        return _open_folder(folder, split or None, path)
    if not split:
        return _open_whole(path)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{text}: only a folder or hf:owner/name has splits; name the files of the split instead")
    return _open_folder(root, split, path)


def _open_whole(text: str) -> ImageSource:
    path = Path(text).expanduser()
    if path.exists():
        return _open_path(path)
    paths: list[Path] = []
    for part in itertools.chain.from_iterable(_expand_braces(piece) for piece in _pieces(text)):
        expanded = os.path.expanduser(part)
        found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded))
        if not part or not found:
            advice = nearest_path(part) or "; check the path given as data"
            raise DataError(f"{part or text}: no such file or folder{advice}")
        paths += [Path(name) for name in found]
    if len(paths) == 1:
        return _open_path(paths[0])
    if all(path.suffix.lower() == ".tar" for path in paths):
        return TarSource(paths, f"{len(paths)} shards {text}")
    return ConcatSource([_open_path(path) for path in paths], f"{len(paths)} sources {text}")


def _pieces(text: str) -> Iterator[str]:
    """Split at commas, but not inside braces."""
    depth, piece = 0, ""
    for letter in text:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth <= 0:
            yield piece.strip()
            piece = ""
        else:
            piece += letter
    yield piece.strip()


def _expand_braces(text: str) -> list[str]:
    """``a-{000..127}.tar`` and ``{a,b}.tar`` as the shell writes them out."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    first, dots, last = match[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        if abs(int(last) - int(first)) > 1_000_000:
            raise DataError(f"{text}: the braces name more than a million files; correct the numbers")
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    before, after = text[: match.start()], text[match.end() :]
    return [whole for choice in choices for whole in _expand_braces(f"{before}{choice}{after}")]


def _open_path(path: Path) -> ImageSource:
    if path.is_dir():
        return _open_folder(path, None, str(path))
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetSource(path)
    if suffix == ".tar":
        return TarSource([path])
    if suffix in (".npz", ".npy"):
        return ArraySource(path)
    if suffix in (".txt", ".csv"):
        return list_source(path)
    if suffix in IMAGE_SUFFIXES:
        return folder_source(path.parent, [path.name])
    raise DataError(f"{path}: unknown kind of data '{suffix or path.name}'; give {_KINDS}")


def _open_folder(root: Path, split: str | None, shown: str) -> ImageSource:
    """A folder of images, or of parquet files or shards; ``split`` is a sub-folder, or a word in the files' names."""
    if split and (root / split).is_dir() and os.path.basename(split) == split:
        return _open_folder(root / split, None, f"{shown}#{split}")
    tables: dict[str, list[str]] = {kind: [] for kind in _TABLES}
    others = 0

    def images() -> Iterator[str]:
        nonlocal others
        for name in walk_files(root):
            ending = os.path.splitext(name)[1].lower()
            if ending in IMAGE_SUFFIXES or ending == ARRAY_SUFFIX:
                yield name
            elif ending in tables:
                tables[ending].append(name)
            else:
                others += 1

    source = folder_source(root, images())
    if len(source) and not split:
        return source
    if len(source):
        raise DataError(f"{shown}#{split}: the folder has images but no sub-folder '{split}'; check the name")
    kind = next((kind for kind in _TABLES if tables[kind]), None)
    if kind is None:
        found = f"none of its {others} files is an image" if others else "the folder is empty"
        raise DataError(f"{shown}: {found}; give a folder with .jpg, .png, .webp, ..., .parquet or .tar files")
    names = _of_split(tables[kind], split, root, shown, kind)
    text = f"folder {root} of {len(names)} {kind.lstrip('.')} files"
    if kind == ".tar":
        return TarSource([root / name for name in names], text)
    return ConcatSource([ParquetSource(root / name) for name in names], text)


def _of_split(names: list[str], split: str | None, root: Path, shown: str, kind: str) -> list[str]:
    """The files of one split; without ``split`` there must be only one."""
    by_split: dict[str, list[str]] = {}
    for name in names:
        match = _SPLIT.search(name.lower())
        by_split.setdefault(match[1] if match else "", []).append(name)
    known = sorted(each for each in by_split if each)
    if split is None:
        if len(known) > 1:
            example = f"{root}/*{min(known, key=len)}*{kind}"
            raise DataError(
                f"{root}: holds the splits {', '.join(known)}; choose one with a pattern like {example} or #{known[0]}"
            )
        return names
    wanted = _SAME.get(split.lower(), split.lower())
    word = re.compile(rf"(?:^|[^a-z]){re.escape(wanted)}(?=[^a-z]|$)")
    chosen = sorted(name for each in known if _SAME.get(each, each) == wanted for name in by_split[each])
    chosen = chosen or [name for name in names if word.search(name.lower())]
    if not chosen:
        found = ", ".join(known) or "not named"
        raise DataError(f"{shown}#{split}: no {kind} file is named so; choose one of the splits: {found}")
    return chosen
