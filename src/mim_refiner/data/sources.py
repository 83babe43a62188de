"""Open any image source from one text: a folder, files of any kind, data of the hub; several, a split, a slice."""

from __future__ import annotations

import glob
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mim_refiner.data.image_files import IMAGE_SUFFIXES
from mim_refiner.data.labels import printable, shown_names
from mim_refiner.data.source_base import ConcatSource, ImageSource, sliced
from mim_refiner.data.source_files import TABLE_SUFFIXES, FileSource, Walk, folder_source, image_files
from mim_refiner.data.source_list import LIST_SUFFIXES, list_source
from mim_refiner.data.source_objects import ArraySource, object_source
from mim_refiner.data.source_parquet import ParquetSource, parquet_folder
from mim_refiner.data.source_tar import TarSource
from mim_refiner.errors import DataError, nearest_path, reason_of
from mim_refiner.reporting import number_of

__all__ = ["ImageSource", "open_source"]

_SLICE = re.compile(r"^(?P<path>.+?)(?P<text>\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d*))?\])$")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|val|valid|validation)(?=[^a-z]|$)")
_BRACES = re.compile(r"\{([^{}]+)\}")
_COMMA = re.compile(r",(?![^{}]*\})")  # outside of braces
_HUB = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_KINDS = (".parquet", ".tar")
_HUB_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_CONVERTED = "refs/convert/parquet"  # the hub's own conversion of most data sets to parquet
_COUNT = re.compile(r"[0-9]{1,18}")
_KINDS = "a folder, .txt, .csv, .tsv, .parquet, .tar, .npz, .npy or hf:owner/name"
_PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_OPENERS: dict[str, Callable[[Path], ImageSource]] = {
    ".parquet": ParquetSource,
    ".tar": lambda path: TarSource([path]),
    **dict.fromkeys((".npz", ".npy"), ArraySource),
    **dict.fromkeys(LIST_SUFFIXES, list_source),
    **dict.fromkeys(IMAGE_SUFFIXES, lambda path: image_files([path])),
}
_MAX_FILES = 1_000_000  # that one pattern may name
_SAME = {"val": "validation", "valid": "validation", "dev": "validation"}


def open_source(spec: Any) -> ImageSource:
    """Open ``spec``, a path or what a program holds (data/source_objects.py), as an image source.

    A folder of images, of parquet files or of tar shards, a .txt/.csv list, .parquet, .tar, .npz or .npy, or
    ``hf:owner/name``; a glob pattern, ``{000..127}`` or a comma-separated list joins several. ``#train`` chooses the
    part of a folder or hub data set that is named so, and ``[start:stop:step]`` at the very end selects a slice of the
    whole, e.g. ``train-*.parquet[:1000]`` or ``hf:owner/name#test[:500]``.

    Raises DataError (one line) when it is missing, empty, of an unknown kind, or damaged.
    """
    source = _open(os.fsdecode(os.fspath(spec))) if isinstance(spec, str | os.PathLike) else object_source(spec)
    source.description = printable(source.description)
    return source


def _open(text: str) -> ImageSource:
    text = text if os.path.exists(text) else text.strip()
    if not text:
        raise DataError(f"no data source given; name {_KINDS}")
    if "\0" in text:
        raise DataError(f"{ascii(text)[:80]}: a path has no null characters; name {_KINDS}")
    match = None if os.path.exists(text) else _SLICE.match(text)
    if match is None:
        return _open_part(text)
    start, stop, step = (int(match[key][:18]) if match[key] else None for key in ("start", "stop", "step"))
    if step == 0:
        raise DataError(f"{text}: the step of a slice cannot be 0; use 1 or more")
    return sliced(_open_part(match["path"]), slice(start, stop, step), match["text"])


def _open_part(text: str) -> ImageSource:
    """Take the split off, then open the rest."""
    path, mark, split = text.rpartition("#")
    if not mark or os.path.exists(os.path.expanduser(text)) or "/" in split:
        path, split = text, ""
    if mark and path != text and not (path and split):
        raise DataError(f"{text}: write the split behind the data, as in folder#train")
    if path.startswith("hf:"):
        return _open_folder(_download(path, split), split or None, path)
    if not split:
        return _open_whole(path)
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise DataError(f"{text}: only a folder or hf:owner/name has splits; name the files of the split instead")
    return _open_folder(root, split, path)


def _download(text: str, split: str) -> Path:
    """Folder with the data files of ``hf:owner/name[@revision]``, in the hub's cache; with ``split`` only that part.

    They are read like local ones, so no data set script ever runs. Raises DataError for a malformed name, a data set
    that is not there or not public or without files that can be read, and without network where nothing is cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    if (match := _HUB.fullmatch(text)) is None:
        raise DataError(f"{text[:200]}: is no data set name; write hf:owner/name, with @revision and #split if needed")
    patterns = [f"*{kind}" for kind in (*_HUB_KINDS, *_HUB_IMAGES)]
    if split:
        patterns = [*(f"*{split}*{kind}" for kind in _HUB_KINDS), f"{split}/*", f"*/{split}/*"]
    for revision in [match["revision"]] if match["revision"] else [None, _CONVERTED]:
        wanted: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
        try:
            folder = Path(snapshot_download(match["repository"], **wanted))
        except RevisionNotFoundError:
            continue
        except Exception as error:  # the hub's client raises its own, httpx's and OSError; all mean: not available
            if revision == _CONVERTED:
                continue
            raise DataError(
                f"{text}: cannot be downloaded ({reason_of(error)}); check name and network, or download the data set "
                "elsewhere and give its folder"
            ) from None
        if any(path.suffix.lower() in (*_HUB_KINDS, *_HUB_IMAGES) for path in folder.rglob("*")):
            return folder
    part = f" for the split '{split}'" if split else ""
    raise DataError(f"{text}: has no parquet, tar or image files{part}; download it by another way and give the folder")


def _open_whole(text: str) -> ImageSource:
    paths = [Path(name) for name in _matches(os.path.expanduser(text))]  # its commas and braces may be part of names
    pieces = [] if paths else _COMMA.split(text)
    for part in itertools.chain.from_iterable(_expand_braces(piece.strip()) for piece in pieces):
        if not (found := _matches(os.path.expanduser(part))):
            advice = nearest_path(part) or "; check the path given as data"
            advice = "; download it first" if "://" in part else advice
            raise DataError(f"{printable(part or text)[:300]}: no such file or folder{advice}")
        paths += map(Path, found)
    if len(paths) == 1:
        return _open_path(paths[0])
    named = Counter(map(Path, map(os.path.realpath, paths)))
    for path, count in named.items():  # the same images would be counted twice, and have one name for two
        by = next((above for above in path.parents if above in named), path if count > 1 else None)
        if by is not None:
            raise DataError(f"{text}: names {path} twice (by {by}); name every file once")
    if all(path.suffix.lower() == ".tar" for path in paths):
        return TarSource(paths, f"{len(paths)} shards {text}")
    if all(path.suffix.lower() == ".parquet" and path.is_file() for path in paths):
        base = os.path.commonpath([path.absolute().parent for path in paths])
        return parquet_folder(Path(base), [os.path.relpath(path, base) for path in paths], f"{len(paths)} files {text}")
    if all(path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() for path in paths):
        return image_files(paths)
    return ConcatSource([_open_path(path) for path in paths], f"{len(paths)} sources {text}")


def _matches(pattern: str) -> list[str]:
    """The path itself, or what the pattern matches; folders that exist are taken as they are written, with [ and *."""
    for form in (pattern, unicodedata.normalize("NFC", pattern), unicodedata.normalize("NFD", pattern)):
        if os.path.exists(form):
            return [form]
    folder = next((above for above in Path(pattern).parents if os.path.isdir(above)), Path(Path(pattern).anchor))
    rest = str(Path(pattern).relative_to(folder))
    if not glob.has_magic(rest):
        return []
    if "**" in rest:  # would be read as * alone, and most files left out
        raise DataError(f"{pattern}: ** is not read; a folder is read with all that lies below it: give the folder")
    try:
        return sorted(glob.glob(os.path.join(glob.escape(str(folder)), rest)))
    except (OSError, ValueError, RecursionError):  # names longer than the system takes
        return []


def _expand_braces(text: str) -> list[str]:
    """``a-{000..127}.tar``, ``{a,b}.tar`` as a shell writes them; DataError for over a million, before any is made."""
    parts: list[tuple[str, Sequence[str | int], int]] = []  # (text before, choices, digits)
    count, end = 1, 0
    for match in _BRACES.finditer(text):
        first, dots, last = match[1].partition("..")
        found: Sequence[str | int] = match[1].split(",")
        if dots and _COUNT.fullmatch(first) and _COUNT.fullmatch(last):
            step = 1 if int(first) <= int(last) else -1
            found = range(int(first), int(last) + step, step)
        count *= len(found)
        if count > _MAX_FILES:
            raise DataError(f"{printable(text)[:200]}: the braces name more than a million files; correct the numbers")
        parts.append((text[end : match.start()], found, len(first)))
        end = match.end()
    written = [
        [before + (each if isinstance(each, str) else f"{each:0{digits}d}") for each in found]
        for before, found, digits in parts
    ]
    return ["".join(choice) for choice in itertools.product(*written, [text[end:]])]


def _open_path(path: Path) -> ImageSource:
    if path.is_dir():
        return _open_folder(path, None, str(path))
    if not path.is_file():
        raise DataError(f"{path}: is no regular file but a pipe or a device; give {_KINDS}")
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        raise DataError(f"{path}: is packed ({suffix}), which has no random access; unpack it and give the folder")
    if suffix not in _OPENERS:
        raise DataError(f"{path}: unknown kind of data '{suffix or path.name}'; give {_KINDS}")
    source = _OPENERS[suffix](path)
    if not len(source):
        raise DataError(f"{path}: the parquet file has no rows; give one with images")
    return source


def _open_folder(root: Path, split: str | None, shown: str) -> ImageSource:
    """A folder of images, or of parquet files or shards; ``split`` is a sub-folder, or a word in the files' names."""
    if split and (root / split).is_dir() and os.path.basename(split) == split:
        return _open_folder(root / split, None, f"{shown}#{split}")
    files = Walk(root)
    source = folder_source(root, files, shown) if split is None else FileSource(root, files)
    source.left_out = files.left_out()
    if len(source) and not split:
        lists = files.others & Counter(LIST_SUFFIXES)
        if source.classes is None and lists:
            source.no_labels += f" (the folder holds {shown_names(sorted(lists))} files: --data may be such a list)"
        return source
    if len(source):
        raise DataError(f"{shown}#{split}: the folder has images but no sub-folder '{split}'; check the name")
    if (kind := next((kind for kind in TABLE_SUFFIXES if files.tables[kind]), None)) is None:
        found = "; ".join(map(str, source.left_out))
        found = f"none of its files is an image: {found}" if found else "the folder is empty"
        raise DataError(f"{shown}: {found}; give a folder with .jpg, .png, .webp, ..., .parquet or .tar files")
    names = _of_split(files.tables[kind], split, root, shown, kind)
    text = f"folder {root} of {number_of(len(names), kind[1:] + ' files')}"
    made = TarSource([root / name for name in names], text) if kind == ".tar" else parquet_folder(root, names, text)
    made.left_out = (*made.left_out, *files.left_out(kind))
    return made


def _of_split(names: list[str], split: str | None, root: Path, shown: str, kind: str) -> list[str]:
    """The files of one split; without ``split`` there must be only one."""
    splits = {name: match[1] for name in names if (match := _SPLIT.search(name.lower()))}
    known = sorted(set(splits.values()))
    if split is None:
        if len(known) > 1:
            example = f"{root}/*{min(known, key=len)}*{kind}"
            raise DataError(
                f"{root}: holds the splits {', '.join(known)}; choose one with a pattern like {example} or #{known[0]}"
            )
        return names
    wanted = _SAME.get(split.lower(), split.lower())
    word = re.compile(rf"(?:^|[^a-z]){re.escape(wanted)}(?=[^a-z]|$)")
    chosen = sorted(name for name, each in splits.items() if _SAME.get(each, each) == wanted)
    chosen = chosen or [name for name in names if word.search(name.lower())]
    if not chosen:
        found = ", ".join(known) or "not named"
        raise DataError(f"{shown}#{split}: no {kind} file is named so; choose one of the splits: {found}")
    return chosen
