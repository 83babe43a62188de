"""Images in .tar shards with WebDataset naming, read in place by their position; nothing is ever unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.data.packed import PackedStrings
from mim_refiner.data.source_base import ImageSource, checked_labels, encode_labels, short_hash
from mim_refiner.data.source_files import ARRAY_SUFFIX, IMAGE_SUFFIXES
from mim_refiner.errors import DataError, RunFolderError
from mim_refiner.files import cache_folder, write_bytes

_BLOCK = 512
_VERSION = 1  # of the cached index
_LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 2**20
_NO_LABEL = "\0"
_IMAGES = IMAGE_SUFFIXES | {ARRAY_SUFFIX}


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of one shard are. ``offset`` 0 marks what cannot be read; ``name`` says why, after a tab."""

    names: PackedStrings
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    labels: PackedStrings  # as written; "\0" = none


class TarSource(ImageSource):
    """The images of one or several shards, in their order.

    A sample is a run of members whose names agree up to the first dot of the last part (``n01/0007.jpg``,
    ``n01/0007.cls``): the first member that ends like an image, with its label from ``.cls`` (a number or a class name)
    or ``.json`` (key label, cls or class). A damaged place, a link, or a member cut off by the end of the file counts
    as one image that cannot be read, so it is listed and left out like a damaged file. Raises DataError for a file
    that is no tar, a packed one, one without images, or labels on a part of the images only.
    """

    def __init__(self, paths: Sequence[Path], description: str | None = None) -> None:
        self.paths = list(paths)
        shards = [open_index(path) for path in self.paths]
        self._shard_ends = np.cumsum([len(shard.names) for shard in shards])
        self.names = PackedStrings.join([shard.names for shard in shards])
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        sizes = np.concatenate([shard.sizes for shard in shards])
        self._sizes = sizes.astype(np.uint32) if sizes.max(initial=0) < 2**32 else sizes
        what = description or (f"shard {paths[0]}" if len(paths) == 1 else f"{len(paths)} shards")
        if not self._offsets.any():
            raise DataError(f"{what}: holds no image that can be read; give shards with .jpg, .png, .webp, ... members")
        self._read_labels(PackedStrings.join([shard.labels for shard in shards]), what)
        kind = "no labels" if self.labels is None else "with labels"
        self.description = f"{what} ({len(self.names)} images, {kind})"

    def _read_labels(self, written: PackedStrings, what: str) -> None:
        missing = sum(1 for label in written if label == _NO_LABEL)
        bad = int((self._offsets == 0).sum())
        if missing == len(written):
            return
        if missing > bad:
            raise DataError(f"{what}: {missing} of {len(written)} images have no .cls or .json label; give all or none")
        usable = next(label for label in written if label != _NO_LABEL)
        raw, self.class_names = encode_labels([usable if label == _NO_LABEL else label for label in written])
        self.labels = checked_labels(raw, self.class_names, what)

    def __len__(self) -> int:
        return len(self.names)

    def _shard(self, index: int) -> Path:
        return self.paths[int(np.searchsorted(self._shard_ends, index, side="right"))]

    def read(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        if not offset:
            raise ValueError(self.names[index].partition("\t")[2])
        # Opened each time: there may be more shards than a process may have open files.
        with self._shard(index).open("rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - offset
            if size > left:
                raise ValueError("the shard ends inside this member")
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        return f"{self._shard(index).name}/{self.names[index].partition(chr(9))[0]}"

    def fingerprint(self) -> str:
        labels = "" if self.labels is None else self.labels
        return short_hash(["tar", self.names.buffer, self._sizes.astype(np.uint64), labels])

    @property
    def index_bytes(self) -> int:
        """Memory of the index."""
        labels = 0 if self.labels is None else self.labels.nbytes
        return self.names.nbytes + self._offsets.nbytes + self._sizes.nbytes + labels


def open_index(path: Path) -> ShardIndex:
    """The index of a shard: from the cache when the file is as it was, else by one pass over its headers."""
    try:
        facts = path.stat()
        with path.open("rb") as file:
            start = file.read(_BLOCK)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions") from None
    if start[:2] == b"\x1f\x8b" or start[:4] in (b"BZh9", b"\xfd7zX", b"\x28\xb5\x2f\xfd"):
        raise DataError(f"{path}: is a packed tar, which has no random access; unpack it to a plain .tar first")
    key = f"{_VERSION} {path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    kept = cache_folder() / "tar-index" / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.npz"
    index = _load_index(kept, facts.st_size)
    if index is None:
        index = _pack(scan_shard(path))
        _save_index(kept, index)
    return index


def _load_index(kept: Path, size: int) -> ShardIndex | None:
    """The cached index; None when there is none, or it is damaged or points outside the shard."""
    try:
        with np.load(kept, allow_pickle=False) as held:
            names = PackedStrings(held["names"], held["name_ends"])
            labels = PackedStrings(held["labels"], held["label_ends"])
            index = ShardIndex(names, held["offsets"], held["sizes"], labels)
    except Exception:  # a cache that cannot be read is made again, whatever is wrong with it
        return None
    lengths = {len(names), len(labels), len(index.offsets), len(index.sizes)}
    sound = len(lengths) == 1 and int(index.offsets.max(initial=0)) <= size
    ends = all(len(text) == 0 or int(text.ends[-1]) == len(text.buffer) for text in (names, labels))
    return index if sound and ends else None


def _save_index(kept: Path, index: ShardIndex) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=index.names.buffer, name_ends=index.names.ends, offsets=index.offsets, sizes=index.sizes,
        labels=index.labels.buffer, label_ends=index.labels.ends,
    )  # fmt: skip
    try:
        write_bytes(kept, buffer.getvalue())
    except RunFolderError:
        return  # a cache folder that cannot be written costs a scan next time, nothing else


def _pack(samples: Iterator[tuple[str, int, int, str]]) -> ShardIndex:
    offsets, sizes = bytearray(), bytearray()
    labels: list[str] = []

    def names() -> Iterator[str]:
        for name, offset, size, label in samples:
            offsets.extend(offset.to_bytes(8, "little"))
            sizes.extend(size.to_bytes(8, "little"))
            labels.append(label)
            yield name

    packed = PackedStrings.pack(names())
    return ShardIndex(
        packed,
        np.frombuffer(bytes(offsets), dtype="<u8"),
        np.frombuffer(bytes(sizes), dtype="<u8"),
        PackedStrings.pack(labels),
    )


def scan_shard(path: Path) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, offset, size, label) of every sample; see :class:`ShardIndex` for what cannot be read.

    The file is mapped, so a header that claims a long extension takes no more memory than the file has.
    """
    if path.stat().st_size < _BLOCK:
        raise DataError(f"{path}: is no tar file, it has only {path.stat().st_size} bytes; give a .tar shard")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            archive = tarfile.open(fileobj=data, mode="r:", ignore_zeros=True)  # noqa: SIM115
        except (tarfile.TarError, ValueError, OSError):
            raise DataError(f"{path}: is no tar file; give shards in WebDataset's form") from None
        yield from _samples(_members(archive, data))


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
        if start > end and _has_content(data, end, start):
            yield f"byte {end}\t{reason}", 0, 0, b""
        if member is None:
            return
        name = member.name.replace("\t", " ")
        end = max(end, member.offset_data + -(-member.size // _BLOCK) * _BLOCK)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            end = max(member.offset_data, start)
            yield f"{name}\tis a link or a special file, not an image", 0, 0, b""
            continue
        label_file = name.endswith((".cls", ".json")) and member.size <= _MAX_LABEL_BYTES
        content = data[member.offset_data : member.offset_data + member.size] if label_file else b""
        yield name, member.offset_data, member.size, content


def _has_content(data: mmap.mmap, start: int, stop: int) -> bool:
    return any(data[at : min(at + 2**20, stop)].strip(b"\0") for at in range(start, stop, 2**20))


def _samples(members: Iterator[tuple[str, int, int, bytes]]) -> Iterator[tuple[str, int, int, str]]:
    """Group members into samples: one image each, with the label beside it."""
    key, image, label = "", None, _NO_LABEL
    for name, offset, size, content in members:
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        this = f"{folder}/{stem}"
        if not offset or this != key:
            if image is not None:
                yield (*image, label)
            key, image, label = (this if offset else ""), None, _NO_LABEL
        if not offset:
            if "\tthe shard" in name or os.path.splitext(name.partition("\t")[0])[1].lower() in _IMAGES:
                yield name, 0, 0, _NO_LABEL
        elif f".{ending.lower()}" in _IMAGES:
            image = image or (name, offset, size)
        elif content:
            label = _label(ending.lower(), content) if label == _NO_LABEL else label
    if image is not None:
        yield (*image, label)


def _label(ending: str, content: bytes) -> str:
    """The label in a .cls or .json file; none when it cannot be read."""
    text = content.decode("utf-8", "replace").strip().replace("\0", "")
    if ending == "cls":
        return text or _NO_LABEL
    try:
        facts: Any = json.loads(text)
    except (ValueError, RecursionError):
        return _NO_LABEL
    found = next((facts[key] for key in _LABEL_KEYS if key in facts), None) if isinstance(facts, dict) else facts
    usable = isinstance(found, int | str) and not isinstance(found, bool) and str(found)
    return str(found) if usable else _NO_LABEL
