"""Images in .tar shards with WebDataset naming, read in place by their position; nothing is ever unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import mmap
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_refiner.data.labels import LabelProblem, Labels, printable
from mim_refiner.data.source_base import Counted, ImageSource, LeftOut, label_parts, short_hash
from mim_refiner.data.source_files import IMAGE_ENDINGS, PackedStrings, packed
from mim_refiner.errors import DataError, RunFolderError
from mim_refiner.files import cache_folder, cache_is_off, reading, write_bytes
from mim_refiner.reporting import number_of

_BLOCK = 512
_VERSION = 5  # of the cached index
_LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 2**20
_NO_LABEL = "\0"
# Where the images of one shard are; what is left out stands in the table's notes. Offset 0 marks what cannot be read,
# and the name says why, after a tab. Labels are as written, "\0" for none.
_INDEX = pa.schema([("name", pa.large_binary()), ("offset", pa.uint64()), ("size", pa.uint64()),
                    ("label", pa.large_binary())])  # fmt: skip


class TarSource(ImageSource):
    """The images of one or several shards, in their order.

    A member that ends like an image is one, with its label from the member of the same name that ends in ``.cls`` (a
    number or a class name) or ``.json`` (key label, cls or class), wherever it stands in the shard. A name may hold
    dots; of a sample as WebDataset writes it (``7.jpg``, ``7.mask.png``) only the first image is read. A damaged place,
    a link, or a member cut off by the end of the file counts as one image that cannot be read, so it is listed and left
    out like a damaged file. Raises DataError for a file that is no tar, a packed one, or one without images.
    """

    def __init__(self, paths: Sequence[Path], description: str | None = None) -> None:
        self.paths = list(paths)
        shards = [open_index(path) for path in self.paths]
        self.base = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))
        self._shown = [printable(os.path.relpath(path, self.base)) for path in paths]
        self._shard_ends = np.cumsum([len(shard) for shard in shards])
        names, offsets, sizes, labels = (column.combine_chunks() for column in pa.concat_tables(shards).columns)
        self.names, self._offsets, self._sizes = PackedStrings(names), offsets.to_numpy(), sizes.to_numpy()
        what = description or (f"shard {paths[0]}" if len(paths) == 1 else f"{len(paths)} shards")
        lost = Counted()  # the same things of several shards, counted together
        for each in itertools.chain.from_iterable(map(_left_out, shards)):
            lost.add(each.what, each.first, each.count)
        self.left_out = tuple(lost.values())
        if not self._offsets.any():
            found = "".join(f"; {each}" for each in self.left_out)
            raise DataError(f"{what}: holds no image that can be read{found}; give shards with .jpg or .png members")
        self.read_labels(lambda: self._labels(PackedStrings(labels)))
        kind = "no labels" if self.classes is None else "with labels"
        self.description = f"{what} ({number_of(len(self.names), 'images')}, {kind})"

    def _labels(self, written: PackedStrings) -> Labels:
        images = self._offsets > 0
        missing = [number for number, label in enumerate(written) if label == _NO_LABEL and images[number]]
        if len(missing) == int(images.sum()):
            endings = next((each for each in self.left_out if "with labels of no image" in each.what), None)
            texts = next((each for each in self.left_out if ".txt" in each.what), None)
            hint = f"{endings}; give them the names of the images" if endings else "put a .cls or .json beside each"
            hint = f"{number_of(texts.count, '.txt members')} not read as labels; name them .cls" if texts else hint
            raise LabelProblem(f"no image has a label beside it: {hint}")
        if missing:
            raise LabelProblem(
                f"{len(missing)} of {number_of(len(written), 'images')} have no .cls or .json label "
                f"(first: {self.name(missing[0])}); give all or none"
            )
        usable = next(label for label, image in zip(written, images, strict=True) if image)  # for damaged places
        labels = (label if image else usable for label, image in zip(written, images, strict=True))
        return Labels.of_texts(labels, where="image {}".format)

    def __len__(self) -> int:
        return len(self.names)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._shard_ends, index, side="right"))

    def read(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        if not offset:
            raise ValueError(self.names[index].partition("\t")[2])
        # Opened each time: there may be more shards than a process may have open files.
        with self.paths[self._shard(index)].open("rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - offset
            if size > left:
                raise ValueError("the shard ends inside this member")
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        return f"{self._shown[self._shard(index)]}/{printable(self.names[index].partition(chr(9))[0])}"

    def fingerprint(self) -> str:
        return short_hash(["tar", "".join(self.names), self._sizes, *label_parts(self.classes)])


def open_index(path: Path) -> pa.Table:
    """The index of a shard: from the cache when the file is as it was, else by one pass over its headers."""
    with reading(path, "check path and permissions"):
        facts = path.stat()
        with path.open("rb") as file:
            start = file.read(_BLOCK)
    if start[:2] == b"\x1f\x8b" or start[:4] in (b"BZh9", b"\xfd7zX", b"\x28\xb5\x2f\xfd"):
        raise DataError(f"{path}: is a packed tar, which has no random access; unpack it to a plain .tar first")
    key = f"{_VERSION} {path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode(errors="surrogateescape")
    # No ending of data: the cache may lie in a folder of images.
    kept = cache_folder() / "tar-index" / f"{hashlib.sha256(key).hexdigest()[:32]}.index"
    if not cache_is_off():
        with contextlib.suppress(Exception):  # a cache that cannot be read is made again, whatever is wrong with it
            index = pq.ParquetFile(kept).read(use_threads=False)
            _left_out(index)
            if index.schema.equals(_INDEX) and index["offset"].to_numpy().max(initial=0) <= facts.st_size:
                return index
    with reading(path, "copy or download it again"):
        index = scan_shard(path)
    if not cache_is_off():
        with contextlib.suppress(RunFolderError):  # without it the next run scans again, nothing else
            pq.write_table(index, buffer := io.BytesIO())
            write_bytes(kept, buffer.getvalue())
    return index


def _left_out(index: pa.Table) -> tuple[LeftOut, ...]:
    return tuple(LeftOut(**facts) for facts in json.loads(index.schema.metadata[b"left_out"]))


def scan_shard(path: Path) -> pa.Table:
    """Find the samples of a shard by its headers; it is mapped: no claimed length takes more memory than it has."""
    size = path.stat().st_size
    if size < _BLOCK:
        raise DataError(f"{path}: is no tar file, it has only {number_of(size, 'bytes')}; give a .tar shard")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            archive = tarfile.open(fileobj=data, mode="r:", ignore_zeros=True)  # noqa: SIM115
        except (tarfile.TarError, ValueError, OSError):
            raise DataError(f"{path}: is no tar file; give shards in WebDataset's form") from None
        return _index(_members(archive, data))


def _members(archive: tarfile.TarFile, data: mmap.mmap) -> Iterator[tuple[str, int, int, bytes]]:
    """Yield (name, offset, size, content of a label file) of every member; offset 0 with a reason for damage."""
    end = 0
    while True:
        reason = "the shard is damaged here"
        try:
            member = archive.next()
            archive.members = []  # type: ignore[attr-defined]  # or every header would stay in memory
        except (tarfile.TarError, ValueError, OSError, MemoryError, OverflowError) as error:
            member, reason = None, f"the shard is damaged or cut off here ({' '.join(str(error).split())[:60]})"
        start = len(data) if member is None else member.offset
        if start > end and any(data[at : min(at + 2**20, start)].strip(b"\0") for at in range(end, start, 2**20)):
            yield f"byte {end}\t{reason}", 0, 0, b""
        if member is None:
            return
        name = member.name.replace("\t", " ").removeprefix("./")
        end = max(end, member.offset_data + -(-member.size // _BLOCK) * _BLOCK)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            end = max(member.offset_data, start)
            yield f"{name}\tis a link or a special file, not an image", 0, 0, b""
            continue
        label_file = name.lower().endswith((".cls", ".json")) and member.size <= _MAX_LABEL_BYTES
        content = data[member.offset_data : member.offset_data + member.size] if label_file else b""
        yield name, member.offset_data, member.size, content


def _index(members: Iterable[tuple[str, int, int, bytes]]) -> pa.Table:
    """All images in their order, with labels."""
    images: dict[str, tuple[int, int]] = {}  # name: offset, size; damaged places with offset 0
    written: dict[str, str] = {}  # name without the ending: label
    firsts: dict[str, str] = {}  # name up to the first dot: its first plain image
    lost = Counted()
    for name, offset, size, content in members:
        stem, written_ending = os.path.splitext(name)
        ending = written_ending.lower()
        if not offset:
            if "\tthe shard" in name or os.path.splitext(name.partition("\t")[0])[1].lower() in IMAGE_ENDINGS:
                images[name] = 0, 0
        elif name.rpartition("/")[2].startswith("."):
            lost.add("hidden members (with a dot before the name)", name)
        elif ending in IMAGE_ENDINGS and name in images:
            lost.add("repeated members", name)
        elif ending in IMAGE_ENDINGS:
            images[name] = offset, size
            if stem == _sample(name):
                firsts.setdefault(stem, name)
        elif ending in (".cls", ".json"):
            written.setdefault(stem, _label(ending, content))
        else:
            lost.add(f"members ending in {printable(written_ending) or 'nothing'}", name)
    rows, labels, used = dict[str, tuple[int, int]](), [], set()
    for name, place in images.items():
        if place[0] and firsts.get(_sample(name), name) != name:  # a mask, or another size
            lost.add("further images of a sample that has one", name)
            continue
        rows[name] = place
        key = next((key for key in (os.path.splitext(name)[0], _sample(name)) if key in written), None)
        used.add(key)
        labels.append(_NO_LABEL if key is None else written[key])
    for key, label in written.items():
        if key not in used and label != _NO_LABEL:
            lost.add("members with labels of no image", key)
    places = np.array(list(rows.values()), dtype=np.uint64).reshape(-1, 2)
    left_out = json.dumps([asdict(each) for each in lost.values()])
    columns = [packed(rows), *map(pa.array, places.T), packed(labels)]
    return pa.table(columns, schema=_INDEX.with_metadata({"left_out": left_out}))


def _sample(name: str) -> str:
    """The name up to the first dot of its last part: what the members of one WebDataset sample share."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _label(ending: str, content: bytes) -> str:
    """The label in a .cls or .json file; none when it cannot be read."""
    text = content.decode("utf-8", "surrogateescape").strip()
    if ending == ".cls":
        return printable(text) or _NO_LABEL
    try:
        facts: Any = json.loads(text)
    except (ValueError, RecursionError):
        return _NO_LABEL
    found = next((facts[key] for key in _LABEL_KEYS if key in facts), None) if isinstance(facts, dict) else facts
    usable = isinstance(found, int | float | str) and str(found)
    return printable(str(found)) if usable else _NO_LABEL
