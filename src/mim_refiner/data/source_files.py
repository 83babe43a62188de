"""Images that are files: below a folder (flat, class folders or nested), or named in a list."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from mim_refiner.data.image_files import IMAGE_SUFFIXES
from mim_refiner.data.labels import LabelProblem, Labels, printable, shown_names
from mim_refiner.data.source_base import Counted, ImageSource, LeftOut, label_parts, short_hash
from mim_refiner.errors import DataError
from mim_refiner.files import read_regular
from mim_refiner.reporting import number_of

# columns of lists and tables that hold the paths of images
PATH_NAMES = ("path", "image", "file", "filename", "image_path", "filepath", "file_name", "img", "image_name")
IMAGE_ENDINGS = IMAGE_SUFFIXES | {".npy"}  # the last: one image an array
TABLE_SUFFIXES = (".parquet", ".tar")
_SPLIT = re.compile(r"(?:(train)|(val|dev|eval)|(test))(?:id|idation|ing)?(?:[ _-]?(?:set|data|images|[0-9]{4}))?")


def is_image_name(name: str) -> bool:
    """Whether a file's ending is that of an image (or of an array that holds one)."""
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS


class FileSource(ImageSource):
    """Image files below ``base``, read one by one; ``names`` are their paths relative to it."""

    def __init__(self, base: Path, names: Iterable[str]) -> None:
        self.base, self.names = base, PackedStrings(names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        path = os.path.join(self.base, self.names[index])  # accents may be composed there and not in a list, or so
        forms = (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
        return read_regular(next(filter(os.path.exists, forms), path))

    def name(self, index: int) -> str:
        return printable(self.names[index])

    def fingerprint(self) -> str:
        sizes = (_size(os.path.join(self.base, name)) for name in self.names)
        return short_hash(itertools.chain(["files"], self.names, sizes, label_parts(self.classes)))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


@dataclass
class Walk:
    """The files below ``root`` by kind, without hidden ones. Iterating gives the images' paths; then the rest is known.

    Folders that are links are followed, except back into a folder above them.
    """

    root: Path
    tables: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in TABLE_SUFFIXES})
    others: Counter[str] = field(default_factory=Counter)  # endings that are not read
    lost: Counted = field(default_factory=Counted)
    _first_other: str = ""

    def __iter__(self) -> Iterator[str]:
        for name in self._walk(str(self.root), "", set()):
            ending = os.path.splitext(name)[1].lower()
            if ending in IMAGE_ENDINGS:
                yield name
            elif ending in self.tables:
                self.tables[ending].append(name)
            else:
                self.others[ending] += 1
                self._first_other = self._first_other or name

    def _walk(self, folder: str, prefix: str, above: set[tuple[int, int]]) -> Iterator[str]:
        try:
            facts = os.stat(folder)
            here = (facts.st_dev, facts.st_ino)
            if here in above:
                return
            with os.scandir(folder) as entries:
                # "a/" as a folder's name: the order is then that of the whole paths.
                found = sorted((f"{entry.name}/" if entry.is_dir() else entry.name, _special(entry))
                               for entry in entries)  # fmt: skip
        except OSError as error:
            self.lost.add(f"folders cannot be opened ({error.strerror or error})", prefix or folder)
            return
        for name, special in found:
            if name.startswith("."):
                if is_image_name(name) and not name.startswith("._"):
                    self.lost.add("hidden files (with a dot before the name)", prefix + name)
            elif name.endswith("/"):
                yield from self._walk(os.path.join(folder, name[:-1]), prefix + name, above | {here})
            elif special:
                self.lost.add("special files (pipes, sockets, devices)", prefix + name)
            else:
                yield prefix + name

    def left_out(self, kind: str = "") -> tuple[LeftOut, ...]:
        """What is not read, when the files of ``kind`` are (an ending of tables; "": the images)."""
        others = self.others + Counter({each: len(names) for each, names in self.tables.items() if each != kind})
        found = list(self.lost.values())
        if others:
            endings = ", ".join(f"{count} {ending or 'without'}" for ending, count in others.most_common(6))
            first = [names[0] for each, names in self.tables.items() if names and each != kind]
            name = printable(self._first_other or first[0])
            found.append(LeftOut(others.total(), f"files with other endings ({printable(endings)})", name))
        return tuple(found)


def _special(entry: os.DirEntry[str]) -> bool:
    """Whether it is neither a file nor a folder; a link to nothing counts as a file that cannot be read."""
    return not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path)


def folder_source(root: Path, names: Iterable[str], shown: str = "") -> FileSource:
    """Make a source of the image files ``names`` below ``root``, which come sorted.

    The sub-folders directly below the root are the classes when every image lies in one of them and there are at
    least two; with any other layout there are no labels, and the reason says what is in the way.
    Raises DataError for a root that holds the folders train and val, or test; ``shown`` is what it calls the root.
    """
    source = FileSource(root, names)
    source.read_labels(lambda: _class_folders(source.names, shown or str(root)))
    kind = "no labels" if source.classes is None else number_of(len(source.classes.names), "class folders")
    source.description = f"folder {root} ({number_of(len(source), 'images')}, {kind})"
    return source


def _class_folders(names: PackedStrings, root: str) -> Labels:
    tops: dict[str, None] = {}
    odd: dict[str, list[str]] = {"outside the class folders": [], "deeper than the class folders": []}
    stray, deep = odd.values()
    for name in names:
        top, slash, rest = name.partition("/")
        if not slash:
            stray.append(name)
            continue
        tops[top] = None
        if "/" in rest:
            deep.append(name)
    kinds = {top: match.lastindex for top in tops if (match := _SPLIT.fullmatch(top.lower()))}
    splits = list(kinds)
    if len(set(kinds.values())) > 1 and (len(splits) == len(tops) or 1 in kinds.values()):
        both = f"{root}/{splits[0]},{root}/{splits[1]}"
        raise DataError(
            f"{root}: holds the splits {', '.join(splits)}; choose one, such as {root}/{splits[0]} or "
            f"{root}#{splits[0]}, or name several: {both}"
        )
    if not tops:
        raise LabelProblem("the images lie in no class folders; put each class into its own folder, or give a list")
    if len(tops) == 1 and not stray:
        only = f"{root}/{printable(next(iter(tops)))}"
        raise LabelProblem(f"all images lie in one folder, and classes need two; if they lie in {only}, give that")
    for where, found in odd.items():
        if found:
            shown = shown_names([printable(name) for name in found], 3)
            some = f"{len(found)} of {number_of(len(names), 'images')}"
            raise LabelProblem(f"{some} lie {where} ({shown}); move them, or give a list")
    return Labels.of_texts((name.partition("/")[0] for name in names), folders=True)


def image_files(paths: list[Path]) -> FileSource:
    """Several image files, each named by hand or by a pattern."""
    base = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))
    return folder_source(base, [os.path.relpath(path, base) for path in paths])


_CODEC = ("utf-8", "surrogateescape")  # paths may hold bytes that are no UTF-8
_AT_ONCE = 2**16  # texts that are objects at a time


class PackedStrings(Sequence[str]):
    """A read-only sequence of texts, made of texts or of an Arrow array of bytes.

    A Python list of a million paths takes about 100 MB, and every forked worker copies it piece by piece, as looking at
    an object writes its reference count. Arrow takes the text itself plus 8 bytes each, and stays shared.
    """

    def __init__(self, texts: Iterable[str] | pa.Array) -> None:
        self.array = texts if isinstance(texts, pa.Array) else packed(texts)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return str(self.array[index].as_py(), *_CODEC)


def packed(texts: Iterable[str]) -> pa.Array:
    """The texts as an Arrow array of bytes, made piece by piece."""
    encoded = (text.encode(*_CODEC) for text in texts)
    parts = [pa.array([], pa.large_binary())]
    while len(parts) == 1 or len(parts[-1]) == _AT_ONCE:
        parts.append(pa.array(itertools.islice(encoded, _AT_ONCE), pa.large_binary()))
    return pa.concat_arrays(parts)
