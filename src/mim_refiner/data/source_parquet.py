"""Images in a parquet file: column ``image`` (encoded bytes or the Hugging Face struct) and optional ``label``."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_refiner.data.source_base import ImageSource, Labels, checked_labels, encode_labels, short_hash
from mim_refiner.errors import DataError

WHOLE_FILE_BYTES = 512 * 2**20  # a smaller file is held in memory whole, a larger one by row group
_GROUPS_IN_MEMORY = 4
_IMAGE_COLUMNS = ("image", "img")


class ParquetSource(ImageSource):
    """One parquet file, opened on the first read.

    A file above ``whole_file_bytes`` is read by row group with the last few groups kept: in-order access is cheap,
    shuffled access reads a whole group for most images, so store such data in small row groups.
    """

    def __init__(self, path: Path, *, whole_file_bytes: int = WHOLE_FILE_BYTES) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                schema, meta = file.schema_arrow, file.metadata
                self.group_ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
                self.column = _image_column(schema, path)
                self._rows = int(meta.num_rows)
                self.class_names = _class_names(schema.metadata or {})
                self.labels = self._read_labels(file, schema)
        except (pa.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path}: not a readable parquet file ({reason}); download or write it again") from None
        if self._rows == 0:
            raise DataError(f"{path}: the parquet file has no rows; give one with images")
        self.size = path.stat().st_size
        self.lazy = self.size > whole_file_bytes
        self.description = f"parquet {path} ({self._rows} images)"
        self._groups: OrderedDict[int, pa.Array] = OrderedDict()
        self._lock = threading.Lock()

    def _read_labels(self, file: pq.ParquetFile, schema: pa.Schema) -> Labels | None:
        if "label" not in schema.names:
            return None
        column = file.read(columns=["label"]).column("label")
        if column.null_count:
            raise DataError(f"{self.path}: {column.null_count} rows have no label; fill them in or drop the column")
        if pa.types.is_integer(column.type):
            labels = column.to_numpy().astype(np.int64)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            labels, self.class_names = encode_labels(column.to_pylist())
        else:
            raise DataError(f"{self.path}: column 'label' is {column.type}; store integers or strings")
        return checked_labels(labels, self.class_names, self.path)

    def __len__(self) -> int:
        return self._rows

    def _group(self, number: int) -> pa.Array:
        """Return the image column of one row group; a small file loads all its groups at once."""
        with self._lock:
            if number not in self._groups:
                self._load(number)
            self._groups.move_to_end(number)
            return self._groups[number]

    def _load(self, number: int) -> None:
        # One thread: pyarrow's own thread pool does not belong in forked workers.
        with pq.ParquetFile(self.path, memory_map=True) as file:
            for group in [number] if self.lazy else range(len(self.group_ends)):
                column = file.read_row_group(group, columns=[self.column], use_threads=False).column(0)
                self._groups[group] = _one_array(column)
        while self.lazy and len(self._groups) > _GROUPS_IN_MEMORY:
            self._groups.popitem(last=False)

    def read(self, index: int) -> bytes:
        number = int(np.searchsorted(self.group_ends, index, side="right"))
        start = int(self.group_ends[number - 1]) if number else 0
        value = self._group(number)[index - start].as_py()
        if isinstance(value, dict):  # Hugging Face: the bytes, or only the path of a file beside the table
            path = value.get("path")
            value = value.get("bytes") or (path and (self.path.parent / path).read_bytes())
        if not value:
            raise ValueError("the row holds no image")
        return bytes(value)

    def name(self, index: int) -> str:
        return f"{self.path.name}[{index}]"

    def fingerprint(self) -> str:
        return short_hash(["parquet", self._rows, self.size, "" if self.labels is None else self.labels])

    def close(self) -> None:
        with self._lock:  # never under the hands of a thread that reads
            self._groups = OrderedDict()

    def stream(self) -> None:
        self.lazy = True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _groups=OrderedDict(), _lock=threading.Lock())


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_binary(column.type):  # 32-bit offsets end at 2 GiB
        column = column.cast(pa.large_binary())
    return pa.concat_arrays(column.chunks)


def _image_column(schema: pa.Schema, path: Path) -> str:
    for name in _IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or struct:
                return name
            raise DataError(f"{path}: column '{name}' is {kind}; store encoded image bytes or the struct (bytes, path)")
    raise DataError(f"{path}: no column 'image' (found {', '.join(schema.names)}); rename the image column")


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """Read the class names from the key ``class_names`` (a JSON list), or from the Hugging Face feature description."""
    try:
        if b"class_names" in metadata:
            return tuple(str(name) for name in json.loads(metadata[b"class_names"]))
        if b"huggingface" in metadata:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return tuple(str(name) for name in features["label"]["names"])
    except (ValueError, KeyError, TypeError):
        return None
    return None
