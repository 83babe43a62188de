"""Features of a whole data set, mapped to a file so that memory does not grow, and then written as one file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.labels import Labels
from mim_refiner.data.loaders import eval_batches
from mim_refiner.errors import DataError, InputError, RunFolderError
from mim_refiner.evaluation.features import block_outputs, own_image_size, resolve_blocks, resolve_poolings
from mim_refiner.files import atomic_file, read_json, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import check_image_size
from mim_refiner.types import BackboneInfo, ImageSize, default_crop_ratio, height_width

POOLINGS = ("cls", "mean", "patches")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
KEEP_EVERY = 8  # batches: so much is computed again after an interruption


@dataclass(frozen=True)
class FeatureSpec:
    """Which features, and everything that decides their bits."""

    block: int  # from 0
    pooling: str  # "cls", "mean", "patches"
    norm: bool
    image_size: ImageSize  # pixels
    batch_size: int
    precision: Literal["fp32", "bf16"]
    dtype: str  # as stored: "float32", "float16"

    @classmethod
    def of(
        cls, info: BackboneInfo, *, block: int, pooling: str | None, image_size: ImageSize | None, **rest: Any
    ) -> FeatureSpec:
        """None is what the authors pool by, mostly cls, else the mean, and the encoder's own size. Raises InputError
        for what the encoder cannot give.
        """
        pooling = pooling or (info.pooling if info.has_cls else "mean")
        if pooling not in POOLINGS:
            raise InputError(f"pooling {pooling!r} is unknown; use {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}")
        if pooling != "patches":
            resolve_poolings([pooling], info)
        [block], size = resolve_blocks([block], info.depth), image_size or own_image_size(info)
        spec = cls(block=block, pooling=pooling, image_size=size, **rest)
        if spec.dtype not in DTYPES:
            raise InputError(f"dtype {spec.dtype!r} is unknown; use {' or '.join(DTYPES)}")
        if spec.batch_size < 1:
            raise InputError(f"batch size {spec.batch_size} must be at least 1")
        check_image_size(height_width(size), info.patch_size)
        return spec

    def transform(self, info: BackboneInfo) -> dict[str, Any]:
        """How an image becomes the encoder's input, in words that a program reads."""
        size = self.image_size
        cut: dict[str, Any] = {"resize": list(height_width(size))}
        if isinstance(size, int):
            cut = {"resize_shorter_side": round(size / default_crop_ratio(size)), "center_crop": size}
        return {
            "channels": "RGB" if info.in_chans == 3 else info.in_chans,
            "interpolation": "bicubic",
            **cut,
            "scale": "0-1",
            "mean": list(info.mean),
            "std": list(info.std),
        }


@dataclass(frozen=True)
class Embedding:
    """``features`` [n, ...] of the n images that could be read, and their numbers ``indices`` [n]."""

    features: NDArray[Any]
    indices: NDArray[np.int64]
    images_per_s: float  # of this call; 0 when there was nothing to do


def compute_features(
    backbone: Backbone, images: ImageSet, spec: FeatureSpec, run: Run, folder: Path | None = None
) -> Embedding:
    """Features of all images, one pass.

    With ``folder`` the rows are mapped to features.npy there, and the next call goes on after what done.json says: a
    batch holds the same images in every call, and so the bits are those of an uninterrupted one.
    Raises DataError for features that are not finite or more than 10 % unreadable images, RunFolderError for a full
    disk.
    """
    first, rows = _kept(folder, images)
    total, done = len(images), first
    filled = first - sum(index < first for index, *_ in images.unreadable)
    started = time.perf_counter()
    run.reporter.phase("images", total)
    backbone.to(run.device)
    batches = eval_batches(images, spec.image_size, spec.batch_size, indices=np.arange(first, total))
    with evaluation_mode(backbone), torch.inference_mode():
        for number, (batch, positions) in enumerate(batches, 1):
            how = {"norm": spec.norm, "class_token_last": spec.pooling == "cls"}
            [output] = block_outputs(backbone, batch, [spec.block], run, **how)
            values = output.patches if spec.pooling == "patches" else output.pooled(spec.pooling)
            found = values.float().to(DTYPES[spec.dtype]).cpu()
            if not bool(torch.isfinite(found).all()):
                raise DataError(
                    f"{images.description}: {spec.pooling} features of block {spec.block} hold NaN or infinity near "
                    f"image {int(positions[0])}; check the checkpoint, or use --precision fp32 --dtype float32"
                )
            if rows is None:
                rows = _room(folder, (total, *found.shape[1:]), found.numpy().dtype)
            rows[filled : filled + len(found)] = found.numpy()
            filled += len(found)
            done = min(total, (int(positions[0]) // spec.batch_size + 1) * spec.batch_size)
            if number % KEEP_EVERY == 0:
                _keep(folder, rows, done, images)
            run.reporter.progress(done, {"images_per_s": (done - first) / (time.perf_counter() - started)})
    if rows is None:
        raise DataError(f"{images.description}: no image could be read; give a source with whole images")
    _keep(folder, rows, total, images)
    speed = (total - first) / (time.perf_counter() - started)
    return Embedding(rows[:filled], np.setdiff1d(np.arange(total), [index for index, *_ in images.unreadable]), speed)


def _room(folder: Path | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if folder is None:
        return np.empty(shape, dtype)
    try:
        rows = np.lib.format.open_memmap(folder / "features.npy", "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a mapped file with holes kills the process when the disk is full
            with open(folder / "features.npy", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return rows
    except OSError as error:
        needed = math.prod(shape) * dtype.itemsize / 1e9
        raise RunFolderError(
            f"{folder}: {needed:.3g} GB for the features cannot be taken ({error.strerror}); make room on its disk, or "
            "choose another --out"
        ) from error


def _keep(folder: Path | None, rows: NDArray[Any], done: int, images: ImageSet) -> None:
    """The rows first, then how many images they are of."""
    if folder is not None:
        rows.flush()  # type: ignore[attr-defined]  # a memory map
        lost = [item for item in images.unreadable if item[0] < done]
        write_json(folder / "done.json", {"done": done, "unreadable": lost})


def _kept(folder: Path | None, images: ImageSet) -> tuple[int, NDArray[Any] | None]:
    """How many images were done, and their rows; none where the files are missing or damaged."""
    if folder is None:
        return 0, None
    try:
        np.load(folder / "features.npy", mmap_mode="r")  # raises for a file cut short, which "r+" would lengthen
        rows = np.load(folder / "features.npy", mmap_mode="r+")
        kept = read_json(folder / "done.json")
        images.add_unreadable((int(index), name, why) for index, name, why in kept["unreadable"])
        return int(kept["done"]), rows
    except Exception:  # a folder of our own: what cannot be read is computed again
        return 0, None


ENDINGS = (".parquet", ".npy", ".safetensors")
_GROUP_BYTES = 2**26  # of a row group


def rows_file(path: Path) -> Path | None:
    """The table beside a file that cannot hold the images' names; None for parquet, which can."""
    return None if path.suffix == ".parquet" else path.with_name(path.name + ".rows.csv")


def write_features(path: Path, found: Embedding, images: ImageSet, manifest: Mapping[str, Any]) -> None:
    """Write the rows to ``path``, atomically and in the order of the data; the same features give the same bytes.

    parquet: columns index, name[, label], features, and the manifest and the classes in the schema's metadata. npy: the
    features alone. safetensors: features, index[, label], and the manifest in the header. Beside the latter two a table
    ``<path>.rows.csv`` gives index, name[, label] of each row.
    """
    columns = {"index": found.indices}
    if images.classes is not None:
        columns["label"] = _written(images.classes)[images.classes.numbers][found.indices]
    if (beside := rows_file(path)) is not None:
        index, *labels = (values.tolist() for values in columns.values())
        with atomic_file(beside) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["row", "index", "name", *list(columns)[1:]])
            for row, (number, *label) in enumerate(zip(index, *labels, strict=True)):
                table.writerow([row, number, images.source.name(number), *label])
            text.detach().flush()
    with atomic_file(path) as file:
        if path.suffix == ".npy":
            np.lib.format.write_array(file, found.features, allow_pickle=False)
        elif path.suffix == ".safetensors":
            save_file({**columns, "features": found.features}, file.name, {"mim_refiner": json.dumps(manifest)})
        else:
            _write_parquet(file, found.features, columns, images, manifest)


def class_list(classes: Labels) -> list[dict[str, Any]]:
    """What the column ``label`` means: its number, as the data writes it where it writes numbers, and the name."""
    return [{"label": int(number), "name": name} for number, name in zip(_written(classes), classes.names, strict=True)]


def _written(classes: Labels) -> NDArray[np.int64]:
    """The number of each class in the column ``label``."""
    ids = classes.ids if classes.ids and max(classes.ids) < 2**63 else range(len(classes.names))
    return np.array(ids, dtype=np.int64)


def _write_parquet(
    file: Any,
    features: NDArray[Any],
    columns: Mapping[str, NDArray[np.int64]],
    images: ImageSet,
    manifest: Mapping[str, Any],
) -> None:
    metadata = {"mim_refiner": json.dumps(manifest)}
    if images.classes is not None:
        metadata["classes"] = json.dumps(class_list(images.classes))

    def table(rows: slice) -> pa.Table:
        values = pa.array(features[rows].reshape(-1))
        for length in reversed(features.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, length)
        index, *labels = (column[rows] for column in columns.values())
        names = pa.array(map(images.source.name, index.tolist()), pa.string())
        known = ["index", "name", *list(columns)[1:], "features"]
        return pa.table([index, names, *labels, values], known, metadata=metadata)

    step, schema = max(1, _GROUP_BYTES // features[0].nbytes), table(slice(0)).schema
    compression = dict.fromkeys(schema.names[:-1], "zstd")  # float features do not get smaller
    with pq.ParquetWriter(file, schema, compression=compression, use_dictionary=False, write_statistics=False) as out:
        for start in range(0, len(features), step):
            out.write_table(table(slice(start, start + step)), row_group_size=step)
