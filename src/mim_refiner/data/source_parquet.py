"""Images in a parquet file: column ``image`` (encoded bytes or the Hugging Face struct) and optional ``label``."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_refiner.data.labels import LabelProblem, Labels, candidates, names_in_metadata, printable, shown_names
from mim_refiner.data.source_base import ConcatSource, ImageSource, LeftOut, label_parts, short_hash
from mim_refiner.data.source_files import PATH_NAMES
from mim_refiner.errors import DataError
from mim_refiner.files import read_regular, reading
from mim_refiner.reporting import number_of

WHOLE_FILE_BYTES = 512 * 2**20  # a smaller file is held in memory whole, a larger one by row group
_GROUPS_IN_MEMORY = 4
MOST_LETTERS = 1000  # of a path
_IMAGE_COLUMNS = ("image", "img")
_OTHERS = ("mask", "annotation", "segmentation", "label")  # hold pictures too, of another kind
_HIVE_MISSING = "__HIVE_DEFAULT_PARTITION__"


class ParquetSource(ImageSource):
    """One parquet file, opened on the first read.

    A file above 512 MB is read by row group with the last few groups kept: in-order access is cheap,
    shuffled access reads a whole group for most images, so store such data in small row groups.
    ``name``: how images are named, default the file's name. ``column``: this one's pictures, without labels. Raises
    DataError when the file is no whole parquet file, or has no column of images.
    """

    def __init__(self, path: Path, *, name: str | None = None, column: str | None = None) -> None:
        self.path, self.base = path, path.parent
        self._name = printable(path.name if name is None else name)
        with reading(path, "download or write the parquet file again"):
            self.size = path.stat().st_size
            with pq.ParquetFile(path) as file:
                schema, meta = file.schema_arrow, file.metadata
                self.starts = np.cumsum([0, *(meta.row_group(g).num_rows for g in range(meta.num_row_groups))])
                self._rows = int(meta.num_rows)
                if self._rows != self.starts[-1] or self._rows > 8 * self.size:
                    raise pa.ArrowInvalid(f"it claims {number_of(self._rows, 'rows')} in {self.size} bytes")
                self.column = column or _image_column(schema, path)
                with path.open("rb") as raw:  # sizes, offsets and statistics of every column chunk stand at the end
                    raw.seek(-min(meta.serialized_size + 8, self.size), os.SEEK_END)
                    self.mark = short_hash([meta.serialized_size, raw.read()])
                if column is None:
                    self.read_labels(lambda: self._read_labels(file, schema))
        if more := [printable(each) for each in schema.names if each != self.column and each.lower() not in _OTHERS]:
            self.left_out = (LeftOut(len(more), "columns of the table", more[0]),)
        self.lazy = self.size > WHOLE_FILE_BYTES
        which = "" if self.column == "image" else f", column {printable(self.column)}"
        self.description = f"parquet {path} ({number_of(self._rows, 'images')}{which})"
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def _read_labels(self, file: pq.ParquetFile, schema: pa.Schema) -> Labels | None:
        if (name := next((each for each in schema.names if each.lower() == "label"), None)) is None:
            hint = candidates(schema.names) or "write a column 'label' for them"
            raise LabelProblem(f"no column 'label' (found {', '.join(map(printable, schema.names))}); {hint}")
        return labels_of_column(file.read(columns=[name]).column(name), names_in_metadata(schema.metadata, name))

    def __len__(self) -> int:
        return self._rows

    def _group(self, number: int) -> pa.ChunkedArray:
        """Return the image column of one row group; a small file loads all its groups at once."""
        with self._lock:
            if number not in self._groups:
                # One thread: pyarrow's own thread pool does not belong in forked workers.
                with pq.ParquetFile(self.path, memory_map=True) as file:
                    for group in [number] if self.lazy else range(len(self.starts) - 1):
                        table = file.read_row_group(group, columns=[self.column], use_threads=False)
                        self._groups[group] = table.column(0)
                while self.lazy and len(self._groups) > _GROUPS_IN_MEMORY:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]

    def read(self, index: int) -> bytes:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        value = self._group(number)[index - int(self.starts[number])].as_py()
        if isinstance(value, dict):  # Hugging Face: the bytes, or only the path of a file beside the table
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:  # below the table's folder, as nobody knows who wrote the table
            if len(value) > MOST_LETTERS:
                raise ValueError("the row holds text too long for a path (base64?); store the bytes of the image")
            if os.path.isabs(value) or ".." in Path(value).parts:
                raise ValueError("the row names a file outside the table's folder")
            value = read_regular(self.path.parent / value)
        if not value:
            raise ValueError("the row holds no image")
        return bytes(value)

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def file_names(self) -> Sequence[str]:
        """From the column ``path`` (or another such name), or the path of the Hugging Face struct."""
        with reading(self.path, "download or write the parquet file again"), pq.ParquetFile(self.path) as file:
            schema = file.schema_arrow
            texts = {field.name.lower(): field.name for field in schema if _is_text(field.type)}
            if (column := next((texts[name] for name in PATH_NAMES if name in texts), None)) is None:
                kind = schema.field(self.column).type
                if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
                    return super().file_names()
                column = f"{self.column}.path"
            values = file.read(columns=[column], use_threads=False).column(0)
            paths = [each["path"] if isinstance(each, dict) else each for each in values.to_pylist()]
            return [self.name(row) if path is None else printable(path) for row, path in enumerate(paths)]

    def fingerprint(self) -> str:
        return short_hash(["parquet", self._rows, self.size, self.mark, *label_parts(self.classes)])

    def close(self) -> None:
        with self._lock:  # never under the hands of a thread that reads
            self._groups = OrderedDict()

    def stream(self) -> None:
        self.lazy = True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _groups=OrderedDict(), _lock=threading.Lock())


def _image_column(schema: pa.Schema, path: Path) -> str:
    """The column ``image`` or ``img``, else the only one that can hold encoded images."""
    fit = [field.name for field in schema if holds_images(field.type) and field.name.lower() not in _OTHERS]
    named = next((name for name in schema.names if name.lower() in _IMAGE_COLUMNS), None)
    if named is not None and (named in fit or pa.types.is_string(schema.field(named).type)):
        return named  # text: the paths of files beside the table
    if named is not None:
        kind = schema.field(named).type
        raise DataError(f"{path}: column '{named}' is {kind}; store encoded image bytes or the struct (bytes, path)")
    if len(fit) == 1:
        return fit[0]
    several = f"; {shown_names(fit)} could hold them" if fit else ""
    found = ", ".join(map(printable, schema.names))
    raise DataError(f"{path}: no column 'image' (found {found}{several}); rename the image column")


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column is of encoded pictures: bytes, or the Hugging Face struct."""
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return binary or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def labels_of_column(column: pa.ChunkedArray, names: list[str] | None = None) -> Labels:
    """Labels in a table's column of whole numbers, booleans or text; LabelProblem says what else it is."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if column.null_count:
        first = column.is_null().index(True).as_py()
        raise LabelProblem(f"row {first} has no label ({column.null_count} of {len(column)} have none); fill it in")
    if pa.types.is_decimal(kind):  # floats would make one class of ids above 2**53
        if names is None:
            return Labels.of_texts(format(value, "f") for value in column.to_pylist())
        column, kind = column.cast(pa.float64()), pa.float64()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Labels.of_numbers(column.to_numpy(), names)
    if _is_text(kind):
        return Labels.of_texts(column.to_pylist())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return Labels.of_texts(value.decode("utf-8", "surrogateescape") for value in column.to_pylist())
    lists = pa.types.is_nested(kind) and not pa.types.is_struct(kind)
    what = "holds lists, several labels an image" if lists else f"is {kind}"
    raise LabelProblem(f"the column 'label' {what}; store one whole number or class name a row")


def parquet_folder(root: Path, names: Sequence[str], description: str) -> ImageSource:
    """The parquet files ``names`` below ``root`` as one source; parts without rows are left out.

    Folders ``label=NAME`` give the labels of files that have no such column. Raises DataError when no file has rows.
    """
    parts = [ParquetSource(root / name, name=name) for name in names]
    full = {name: part for name, part in zip(names, parts, strict=True) if len(part)}
    if not full:
        raise DataError(f"{root}: its parquet files have no rows; give one with images")
    for name, part in full.items():
        keys = dict(piece.split("=", 1) for piece in name.split("/")[:-1] if "=" in piece)
        part.base = root
        if part.classes is None and "label" in keys:
            label = unquote(keys["label"]).replace(_HIVE_MISSING, "")
            part.read_labels(partial(Labels.of_texts, [label] * len(part)))
        elif part.classes is None and candidates(keys):
            part.no_labels = f"the folders {next(iter(keys))}=... are not read as labels; rename them to label=..."
    source = ConcatSource([*full.values()], description)
    source.left_out = tuple(dict.fromkeys(source.left_out))  # columns of all files alike: once
    if len(full) < len(parts):
        first = next(part for part in parts if not len(part))
        empty = LeftOut(len(parts) - len(full), "parquet files without rows", first.path.name)
        source.left_out = (*source.left_out, empty)
    return source
