"""Write finished parts as one file: parquet, npy or safetensors by the ending. One part is in memory at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.labels import Labels
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.feature_parts import PartFolder
from mim_refiner.files import atomic_file

_ROWS_SUFFIX = ".rows.csv"


def check_ending(path: Path) -> None:
    """Raise InputError for a file ending that is none of ours."""
    if path.suffix not in _WRITERS:
        raise InputError(
            f"--out {path}: unknown kind of file '{path.suffix}'; end it with {', '.join(list(_WRITERS)[:-1])} "
            f"or {list(_WRITERS)[-1]}"
        )


def rows_file(path: Path) -> Path | None:
    """The table beside a file that cannot hold the images' names; None for parquet, which can."""
    return None if path.suffix == ".parquet" else path.with_name(path.name + _ROWS_SUFFIX)


def assemble(path: Path, parts: PartFolder, images: ImageSet, manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Write all parts to ``path``, atomically, with one row an image in the order of the data; return the shape.

    parquet: columns index, name[, label], features, and the manifest and the classes in the schema's metadata. npy: the
    features alone. safetensors: features, index[, label], and the manifest in the header. Beside the latter two a table
    ``<path>.rows.csv`` gives index, name[, label] of each row.
    The same parts give the same bytes.
    """
    indices = [parts.indices(number) for number in range(parts.count())]
    rows = sum(len(some) for some in indices)
    shape = (rows, *_row_shape(parts, images))
    beside = rows_file(path)
    if beside is not None:
        _write_rows(beside, indices, images)
    _WRITERS[path.suffix](path, parts, images, shape, manifest)
    return shape


def class_list(classes: Labels) -> list[dict[str, Any]]:
    """What the column ``label`` means: its number, as the data writes it where it writes numbers, and the name."""
    numbers = _written(classes)
    return [{"label": int(number), "name": name} for number, name in zip(numbers, classes.names, strict=True)]


def label_numbers(images: ImageSet) -> NDArray[np.int64] | None:
    """The column ``label`` [N]: the numbers of the data, or 0, 1, 2, ... where it has names; None without labels."""
    return None if images.classes is None else _written(images.classes)[images.classes.numbers]


def _written(classes: Labels) -> NDArray[np.int64]:
    ids = classes.ids if classes.ids and max(classes.ids) < 2**63 else range(len(classes.names))
    return np.array(ids, dtype=np.int64)


def _row_shape(parts: PartFolder, images: ImageSet) -> tuple[int, ...]:
    for part in parts.all():
        if part.features is not None:
            return part.features.shape[1:]
    raise DataError(f"{images.description}: no image could be read; give a source with whole images")


def _write_parquet(
    path: Path, parts: PartFolder, images: ImageSet, shape: tuple[int, ...], manifest: Mapping[str, Any]
) -> None:
    sample = next(part.features for part in parts.all() if part.features is not None)
    kind = pa.from_numpy_dtype(sample.dtype)
    for length in reversed(shape[1:]):
        kind = pa.list_(kind, length)
    fields = [pa.field("index", pa.int64()), pa.field("name", pa.string())]
    labels = label_numbers(images)
    if labels is not None:
        fields.append(pa.field("label", pa.int64()))
    metadata = {"mim_refiner": json.dumps(manifest)}
    if images.classes is not None:
        metadata["classes"] = json.dumps(class_list(images.classes))
    schema = pa.schema([*fields, pa.field("features", kind)], metadata=metadata)
    compression = {field.name: "zstd" for field in fields}  # float features do not get smaller
    with (
        atomic_file(path) as file,
        pq.ParquetWriter(file, schema, compression=compression, use_dictionary=False, write_statistics=False) as writer,
    ):
        for part in parts.all():
            if part.features is None:
                continue
            columns = [pa.array(part.indices), pa.array([images.source.name(int(index)) for index in part.indices])]
            if labels is not None:
                columns.append(pa.array(labels[part.indices]))
            features = pa.array(part.features.reshape(-1))
            for length in reversed(shape[1:]):
                features = pa.FixedSizeListArray.from_arrays(features, length)
            writer.write_table(pa.table([*columns, features], schema=schema), row_group_size=len(part.indices))


def _write_npy(path: Path, parts: PartFolder, images: ImageSet, shape: tuple[int, ...], _: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        header = {"descr": _little_endian_descr(parts), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        _write_features(file, parts)


def _write_safetensors(
    path: Path, parts: PartFolder, images: ImageSet, shape: tuple[int, ...], manifest: Mapping[str, Any]
) -> None:
    """The library's own writer wants every tensor in memory; the format is a JSON header and the bytes behind it."""
    names = {"<f4": "F32", "<f2": "F16"}
    descr = _little_endian_descr(parts)
    index = np.concatenate([parts.indices(number) for number in range(parts.count())])
    labels = label_numbers(images)
    columns = {"index": index} | ({} if labels is None else {"label": labels[index]})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "mim_refiner": json.dumps(manifest)}}
    end = 0
    for name, column in columns.items():
        start, end = end, end + column.nbytes
        header[name] = {"dtype": "I64", "shape": list(column.shape), "data_offsets": [start, end]}
    size = int(np.prod(shape)) * np.dtype(descr).itemsize
    header["features"] = {"dtype": names[descr], "shape": list(shape), "data_offsets": [end, end + size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            file.write(column.astype("<i8").tobytes())
        _write_features(file, parts)


def _write_features(file: BinaryIO, parts: PartFolder) -> None:
    for part in parts.all():
        if part.features is not None:
            file.write(np.ascontiguousarray(part.features, part.features.dtype.newbyteorder("<")).data)


def _little_endian_descr(parts: PartFolder) -> str:
    sample = next(part.features for part in parts.all() if part.features is not None)
    return sample.dtype.newbyteorder("<").str


def _write_rows(path: Path, indices: list[NDArray[np.int64]], images: ImageSet) -> None:
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        labels = label_numbers(images)
        table.writerow(["row", "index", "name"] + ([] if labels is None else ["label"]))
        row = 0
        for some in indices:
            for index in some.tolist():
                label = [] if labels is None else [int(labels[index])]
                table.writerow([row, index, images.source.name(index), *label])
                row += 1
        text.flush()
        text.detach()


_Writer = Callable[[Path, PartFolder, ImageSet, tuple[int, ...], Mapping[str, Any]], None]
_WRITERS: dict[str, _Writer] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}
