"""What every image source offers, and the two ways sources combine: a slice and a concatenation."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.errors import DataError

Labels = NDArray[np.int64]


class ImageSource(ABC):
    """A numbered list of still encoded (or raw) images, labels optional.

    ``labels`` is int64 [N] or None; ``class_names`` is in label order or None.
    """

    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None
    description: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[Any]:
        """Return the encoded file, or pixels uint8 or uint16 [H, W, C]. OSError or ValueError for a bad item."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of one image for messages, e.g. its path below the root."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Short stable hash of names, sizes and labels; it does not depend on where the data lies."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Release buffers; the next ``read`` opens them again."""

    def stream(self) -> None:  # noqa: B027 - most sources hold nothing
        """From now on images are read about in order: hold no more than that needs, however large the data."""


def short_hash(parts: Iterable[object]) -> str:
    """Hash a sequence of strings, numbers and arrays to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.tobytes() if isinstance(part, np.ndarray) else str(part).encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def encode_labels(values: Sequence[str]) -> tuple[Labels, tuple[str, ...] | None]:
    """Integer strings become labels as they are; any other strings become indices into the sorted class names."""
    try:
        return np.asarray([int(value) for value in values], dtype=np.int64), None
    except ValueError:
        names = sorted(set(values))
        index = {name: position for position, name in enumerate(names)}
        return np.asarray([index[value] for value in values], dtype=np.int64), tuple(names)


def checked_labels(labels: Labels, class_names: tuple[str, ...] | None, where: str | Path) -> Labels | None:
    """Return the labels, None when every one is -1 (unlabelled); raise DataError when they cannot be class indices."""
    if len(labels) and (labels == -1).all():
        return None
    if len(labels) and labels.min() < 0:
        raise DataError(f"{where}: label {labels.min()} in row {int(labels.argmin())} is negative; use 0, 1, 2, ...")
    if class_names is not None and len(labels) and labels.max() >= len(class_names):
        counts = f"label {labels.max()} but only {len(class_names)} class names"
        raise DataError(f"{where}: {counts}; correct one of the two")
    return labels


class SlicedSource(ImageSource):
    """``source[start:stop:step]`` as a source of its own."""

    def __init__(self, source: ImageSource, selection: slice, text: str) -> None:
        self.source = source
        self.indices = range(len(source))[selection]
        if not self.indices:
            raise DataError(f"{source.description}: the slice {text} selects none of {len(source)} images; widen it")
        self.labels = None if source.labels is None else source.labels[selection]
        self.class_names = source.class_names
        self.description = f"{source.description}, slice {text} ({len(self.indices)} images)"

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | NDArray[Any]:
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def fingerprint(self) -> str:
        return short_hash([self.source.fingerprint(), self.indices])

    def close(self) -> None:
        self.source.close()

    def stream(self) -> None:
        self.source.stream()


class ConcatSource(ImageSource):
    """Several sources one after the other. All or none have labels, and their class names agree."""

    def __init__(self, parts: Sequence[ImageSource], description: str) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        self.description = f"{description} ({int(self.ends[-1])} images)"
        labelled = [part.labels for part in parts if part.labels is not None]
        if labelled and len(labelled) != len(parts):
            mixed = f"{len(labelled)} of {len(parts)} parts have labels, the others none"
            raise DataError(f"{description}: {mixed}; name parts of one kind")
        if len({part.class_names for part in parts}) > 1:
            raise DataError(f"{description}: the parts have different class names; name one data set, not several")
        self.labels = np.concatenate(labelled) if labelled else None
        if self.labels is not None:  # one copy of the labels is enough
            for part, stop in zip(self.parts, self.ends.tolist(), strict=True):
                part.labels = self.labels[stop - len(part) : stop]
        self.class_names = parts[0].class_names
        self._recent: list[ImageSource] | None = None  # the parts read last, when streaming

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[ImageSource, int]:
        """The part that image ``index`` comes from, and its number there."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - (int(self.ends[part - 1]) if part else 0)

    def read(self, index: int) -> bytes | NDArray[Any]:
        part, local = self.locate(index)
        if self._recent is not None and part not in self._recent:
            self._recent.append(part)
            if len(self._recent) > 2:  # another thread may still read the one before
                self._recent.pop(0).close()
        return part.read(local)

    def name(self, index: int) -> str:
        part, local = self.locate(index)
        return part.name(local)

    def fingerprint(self) -> str:
        return short_hash(part.fingerprint() for part in self.parts)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def stream(self) -> None:
        self._recent = []
        for part in self.parts:
            part.stream()
