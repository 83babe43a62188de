"""What every image source offers, and the ways sources combine: a selection and a concatenation."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.data.labels import LabelProblem, Labels, printable
from mim_refiner.errors import DataError
from mim_refiner.reporting import number_of


@dataclass(frozen=True)
class LeftOut:
    """Things in the data that are not read: how many, what they are and why, and the name of the first."""

    count: int
    what: str
    first: str

    def __str__(self) -> str:
        return f"{number_of(self.count, self.what)} (first: {self.first})"


class Counted(dict[str, LeftOut]):
    """Things left out, by what they are."""

    def add(self, what: str, first: str, count: int = 1) -> None:
        """Count some more; the first name of each kind is kept."""
        before = self.setdefault(what, LeftOut(0, what, printable(first)))
        self[what] = LeftOut(before.count + count, what, before.first)


@dataclass(frozen=True)
class Shared:
    """Test images that are training images too: how many of those compared, and the first pair."""

    count: int
    compared: int
    first: str

    def __str__(self) -> str:
        return (f"{self.count} of {number_of(self.compared, 'test images')} compared are among the training images "
                f"(first: {self.first}): accuracies on them are too high")  # fmt: skip


class ImageSource(ABC):
    """A numbered list of still encoded (or raw) images, labels optional.

    ``classes`` are their labels; where it is None, ``no_labels`` says why. ``left_out`` counts what lies in the data
    and is not read. ``base`` is the folder that names are relative to. ``shared``: training images among these, as far
    as they have been compared. ``parts``: the sources that this one is made of.
    """

    parts: Sequence[ImageSource] = ()
    classes: Labels | None = None
    no_labels: str = "the data holds none; give class folders, a label column or a labels array"
    shared: Shared | None = None
    left_out: tuple[LeftOut, ...] = ()
    base: Path = Path()
    description: str = ""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers [N] in 0..C-1, or None."""
        return None if self.classes is None else self.classes.numbers

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes [C], or None without labels."""
        return None if self.classes is None else self.classes.names

    @property
    def counted(self) -> str:
        """The description for sentences that go on to say that there are no labels."""
        return self.description.replace(", no labels)", ")")

    def read_labels(self, read: Callable[[], Labels | None]) -> None:
        """Set ``classes`` to what ``read`` gives; a LabelProblem becomes the reason for having none."""
        try:
            self.classes = read()
        except LabelProblem as problem:
            self.no_labels = str(problem)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[Any]:
        """Return the encoded file, or pixels uint8 or uint16 [H, W, C]. OSError or ValueError for a bad item."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of one image for people: its path below ``base``, in one line of valid UTF-8."""

    def file_names(self) -> Sequence[str]:
        """Name of every image as its publisher wrote it, where the data tells; else :meth:`name`."""
        return [self.name(index) for index in range(len(self))]

    @abstractmethod
    def fingerprint(self) -> str:
        """Short stable hash of names, sizes and labels; it does not depend on where the data lies."""

    def close(self) -> None:
        """Release buffers; the next ``read`` opens them again."""
        for part in self.parts:
            part.close()

    def stream(self) -> None:
        """From now on images are read about in order: hold no more than that needs, however large the data."""
        for part in self.parts:
            part.stream()

    def facts(self) -> dict[str, Any]:
        """What results and reports record of the data."""
        whole = {"source": self.description, "images": len(self), "fingerprint": self.fingerprint()}
        whole |= {"classes": len(self.class_names or ())} | (
            {"no_labels": self.no_labels} if self.classes is None else {}
        )
        shared = {} if self.shared is None else {"also_in_train": asdict(self.shared)}
        return whole | {"left_out": [asdict(each) for each in self.left_out]} | shared


def evenly(count: int, most: int | None) -> NDArray[np.int64]:
    """At most so many of 0..count-1, evenly spaced (even over sorted class folders), with the first; None: all."""
    return np.linspace(0, count - 1, count if most is None else min(most, count)).astype(np.int64)


def short_hash(parts: Iterable[object]) -> str:
    """Hash a sequence of strings, bytes, numbers and arrays to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.tobytes() if isinstance(part, np.ndarray) else part
        raw = raw if isinstance(raw, bytes) else str(raw).encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def label_parts(classes: Labels | None) -> list[object]:
    """The labels as a part of a fingerprint."""
    return [""] if classes is None else [classes.numbers, *classes.names]


class Selection(ImageSource):
    """Some images of another source, in the order of ``indices``; the classes are those that they have."""

    def __init__(self, source: ImageSource, indices: range | NDArray[np.int64], description: str) -> None:
        self.source, self.indices, self.description, self.parts = source, indices, description, (source,)
        self.no_labels, self.left_out, self.base = source.no_labels, source.left_out, source.base
        if source.classes is not None:
            self.classes = source.classes.take(np.asarray(indices, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | NDArray[Any]:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def file_names(self) -> Sequence[str]:
        names = self.source.file_names()
        return [names[int(index)] for index in self.indices]

    def fingerprint(self) -> str:
        return short_hash([self.source.fingerprint(), self.indices])


def sliced(source: ImageSource, selection: slice, text: str) -> Selection:
    """``source[start:stop:step]`` as a source of its own; ``text`` is how the slice was written."""
    indices = range(len(source))[selection]
    if not indices:
        raise DataError(
            f"{source.description}: the slice {text} selects none of {number_of(len(source), 'images')}; widen it"
        )
    return Selection(source, indices, f"{source.description}, slice {text} ({number_of(len(indices), 'images')})")


class ConcatSource(ImageSource):
    """Several sources one after the other; their classes are joined by name. Without labels when one part has none."""

    def __init__(self, parts: Sequence[ImageSource], description: str) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        self.description = f"{description} ({number_of(len(self), 'images')})"
        self.left_out = tuple(each for part in parts for each in part.left_out)
        self.base = Path(os.path.commonpath([os.path.abspath(part.base) for part in parts]))
        between = [os.path.relpath(part.base, self.base) for part in parts]
        self._prefixes = ["" if folder == "." else f"{printable(folder)}/" for folder in between]  # names differ so
        self.read_labels(self._joined)
        for part in self.parts:
            part.classes = None  # one copy of the labels is enough
        self._recent: list[ImageSource] | None = None  # the parts read last, when streaming

    def _joined(self) -> Labels:
        labelled = [part.classes for part in self.parts if part.classes is not None]
        bare = next((part for part in self.parts if part.classes is None), None)
        if bare is not None and not labelled:
            raise LabelProblem(bare.no_labels)
        if bare is not None:
            counts = f"{len(self.parts) - len(labelled)} of {len(self.parts)} parts have none"
            raise LabelProblem(f"{counts} (first: {bare.description}: {bare.no_labels})")
        return Labels.join(labelled)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the part that image ``index`` comes from, and the image's number there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def read(self, index: int) -> bytes | NDArray[Any]:
        number, local = self.locate(index)
        part = self.parts[number]
        if self._recent is not None and part not in self._recent:
            self._recent.append(part)
            if len(self._recent) > 2:  # another thread may still read the one before
                self._recent.pop(0).close()
        return part.read(local)

    def name(self, index: int) -> str:
        part, local = self.locate(index)
        return self._prefixes[part] + self.parts[part].name(local)

    def file_names(self) -> Sequence[str]:
        parts = zip(self._prefixes, self.parts, strict=True)
        return [prefix + name for prefix, part in parts for name in part.file_names()]

    def fingerprint(self) -> str:
        return short_hash([*(part.fingerprint() for part in self.parts), *label_parts(self.classes)])

    def stream(self) -> None:
        self._recent = []
        super().stream()
