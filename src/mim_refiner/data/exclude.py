"""Leave listed images out of a source: the file that ``doctor`` writes, or any list of names or numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.data.source_base import ImageSource, short_hash
from mim_refiner.errors import DataError, did_you_mean


class SubsetSource(ImageSource):
    """The images ``indices`` of another source, in that order."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64], description: str) -> None:
        self.source, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names
        self.description = description

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | NDArray[Any]:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        return short_hash([self.source.fingerprint(), self.indices])

    def close(self) -> None:
        self.source.close()

    def stream(self) -> None:
        self.source.stream()


def without_listed(source: ImageSource, path: str | Path) -> SubsetSource:
    """Return ``source`` without the images named in the text file ``path``.

    One image a line: its name as doctor and skipped_images.txt write it (text after a tab is a comment), or its number
    in the source. Lines that begin with # and empty lines are ignored. Names of images that the source does not hold
    are allowed (a list may serve several sources), but at least one line must match. Raises DataError for an
    unreadable list, a list that matches nothing, or one that leaves nothing.
    """
    entries = _entries(Path(path).expanduser())
    rows: dict[str, list[int]] = {}
    for index in range(len(source)):
        rows.setdefault(source.name(index), []).append(index)
    dropped: set[int] = set()
    for entry in entries:
        if entry in rows:
            dropped.update(rows[entry])
        elif entry.isdigit() and int(entry) < len(source):
            dropped.add(int(entry))
    if entries and not dropped:
        hint = did_you_mean(entries[0], list(rows)[:10_000])
        raise DataError(
            f"{path}: none of its {len(entries)} lines names an image of {source.description} (first: "
            f"'{entries[0]}'{hint}); give the list that doctor wrote for this --data"
        )
    if len(dropped) == len(source):
        raise DataError(f"{path}: leaves none of the {len(source)} images of {source.description}; shorten the list")
    kept = np.array([index for index in range(len(source)) if index not in dropped], dtype=np.int64)
    return SubsetSource(source, kept, f"{source.description} without {len(dropped)} of {Path(path).name}")


def _entries(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the list of images to leave out ({error.strerror}); give the file that doctor wrote"
        ) from None
    lines = [line.partition("\t")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
