"""Many short texts in Arrow's two buffers: the index of a data set that does not weigh on every worker.

A Python list of a million paths takes about 100 MB, and every forked worker copies it piece by piece, as looking at an
object writes its reference count. Arrow takes the text itself plus 8 bytes each, and stays shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

_CODEC = ("utf-8", "surrogateescape")  # paths may hold bytes that are no UTF-8
_AT_ONCE = 2**16  # texts that are objects at a time


class PackedStrings(Sequence[str]):
    """A read-only sequence of texts, made of texts or of an Arrow array of bytes."""

    def __init__(self, texts: Iterable[str] | pa.Array) -> None:
        self.array = texts if isinstance(texts, pa.Array) else packed(texts)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return str(self.array[index].as_py(), *_CODEC)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def packed(texts: Iterable[str]) -> pa.Array:
    """The texts as an Arrow array of bytes, made piece by piece."""
    encoded = (text.encode(*_CODEC) for text in texts)
    parts = [pa.array([], pa.large_binary())]
    while len(parts) == 1 or len(parts[-1]) == _AT_ONCE:
        parts.append(pa.array(itertools.islice(encoded, _AT_ONCE), pa.large_binary()))
    return pa.concat_arrays(parts)
