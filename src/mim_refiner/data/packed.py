"""Many short texts in two arrays: the index of a data set that does not weigh on every worker.

A Python list of a million paths takes about 100 MB, and every forked worker copies it piece by piece, as looking at an
object writes its reference count. Two NumPy arrays take the text itself plus 4 or 8 bytes each and stay shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

_CODEC = ("utf-8", "surrogateescape")  # paths may hold bytes that are no UTF-8


class PackedStrings(Sequence[str]):
    """A read-only sequence of texts: one byte buffer and the end of each text in it."""

    def __init__(self, buffer: NDArray[np.uint8], ends: NDArray[np.unsignedinteger]) -> None:
        self.buffer = buffer
        self.ends = ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> PackedStrings:
        """Pack ``texts`` one by one; they are never all in memory as objects."""
        if isinstance(texts, PackedStrings):
            return texts
        buffer, lengths = bytearray(), bytearray()
        for text in texts:
            raw = text.encode(*_CODEC)
            buffer += raw
            lengths += len(raw).to_bytes(4, "little")
        ends = np.cumsum(np.frombuffer(lengths, dtype="<u4"), dtype=np.uint64)
        small = len(buffer) < 2**32
        return cls(np.frombuffer(bytes(buffer), dtype=np.uint8), ends.astype(np.uint32) if small else ends)

    @classmethod
    def join(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """The texts of several one after the other."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
        ends = np.concatenate(
            [part.ends.astype(np.uint64) + np.uint64(start) for part, start in zip(parts, starts, strict=False)]
        )
        small = int(starts[-1]) < 2**32
        return cls(np.concatenate([part.buffer for part in parts]), ends.astype(np.uint32) if small else ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = int(self.ends[position - 1]) if position else 0
        return self.buffer[start : int(self.ends[position])].tobytes().decode(*_CODEC)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends:
            yield self.buffer[start : int(end)].tobytes().decode(*_CODEC)
            start = int(end)
