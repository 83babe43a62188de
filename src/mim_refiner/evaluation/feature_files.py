"""Write features as one file: parquet, npy or safetensors by the ending. They may be mapped to a file themselves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.labels import Labels
from mim_refiner.errors import InputError
from mim_refiner.evaluation.embedding import Embedding
from mim_refiner.files import atomic_file

ENDINGS = (".parquet", ".npy", ".safetensors")
_GROUP_BYTES = 2**26  # of a row group


def check_ending(path: Path) -> None:
    """Raise InputError for a file ending that is none of ours."""
    if path.suffix not in ENDINGS:
        known = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise InputError(f"--out {path}: unknown kind of file '{path.suffix}'; end it with {known}")


def rows_file(path: Path) -> Path | None:
    """The table beside a file that cannot hold the images' names; None for parquet, which can."""
    return None if path.suffix == ".parquet" else path.with_name(path.name + ".rows.csv")


def write_features(path: Path, found: Embedding, images: ImageSet, manifest: Mapping[str, Any]) -> None:
    """Write the rows to ``path``, atomically and in the order of the data; the same features give the same bytes.

    parquet: columns index, name[, label], features, and the manifest and the classes in the schema's metadata. npy: the
    features alone. safetensors: features, index[, label], and the manifest in the header. Beside the latter two a table
    ``<path>.rows.csv`` gives index, name[, label] of each row.
    """
    labels = None if images.classes is None else _written(images.classes)[images.classes.numbers][found.indices]
    beside = rows_file(path)
    if beside is not None:
        _write_rows(beside, found.indices, labels, images)
    with atomic_file(path) as file:
        if path.suffix == ".npy":
            np.lib.format.write_array(file, found.features, allow_pickle=False)
        elif path.suffix == ".safetensors":
            columns = {"index": found.indices} | ({} if labels is None else {"label": labels})
            save_file({**columns, "features": found.features}, file.name, {"mim_refiner": json.dumps(manifest)})
        else:
            _write_parquet(file, found, labels, images, manifest)


def class_list(classes: Labels) -> list[dict[str, Any]]:
    """What the column ``label`` means: its number, as the data writes it where it writes numbers, and the name."""
    return [{"label": int(number), "name": name} for number, name in zip(_written(classes), classes.names, strict=True)]


def _written(classes: Labels) -> NDArray[np.int64]:
    """The number of each class in the column ``label``."""
    ids = classes.ids if classes.ids and max(classes.ids) < 2**63 else range(len(classes.names))
    return np.array(ids, dtype=np.int64)


def _write_parquet(
    file: Any, found: Embedding, labels: NDArray[np.int64] | None, images: ImageSet, manifest: Mapping[str, Any]
) -> None:
    kind = pa.from_numpy_dtype(found.features.dtype)
    for length in reversed(found.features.shape[1:]):
        kind = pa.list_(kind, length)
    fields = [("index", pa.int64()), ("name", pa.string()), *([] if labels is None else [("label", pa.int64())])]
    metadata = {"mim_refiner": json.dumps(manifest)}
    if images.classes is not None:
        metadata["classes"] = json.dumps(class_list(images.classes))
    schema = pa.schema([*fields, ("features", kind)], metadata=metadata)
    compression = {name: "zstd" for name, _ in fields}  # float features do not get smaller
    step = max(1, _GROUP_BYTES // found.features[0].nbytes)
    with pq.ParquetWriter(file, schema, compression=compression, use_dictionary=False, write_statistics=False) as out:
        for start in range(0, len(found.indices), step):
            rows = slice(start, start + step)
            indices = found.indices[rows]
            columns = [pa.array(indices), pa.array([images.source.name(index) for index in indices.tolist()])]
            columns += [] if labels is None else [pa.array(labels[rows])]
            features = pa.array(found.features[rows].reshape(-1))
            for length in reversed(found.features.shape[1:]):
                features = pa.FixedSizeListArray.from_arrays(features, length)
            out.write_table(pa.table([*columns, features], schema=schema), row_group_size=len(indices))


def _write_rows(path: Path, indices: NDArray[np.int64], labels: NDArray[np.int64] | None, images: ImageSet) -> None:
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["row", "index", "name"] + ([] if labels is None else ["label"]))
        for row, index in enumerate(indices.tolist()):
            label = [] if labels is None else [int(labels[row])]
            table.writerow([row, index, images.source.name(index), *label])
        text.detach().flush()
