"""Features of a whole data set, mapped to a file: memory does not grow with the data, an interruption loses little."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import default_crop_ratio, eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.errors import DataError, InputError, RunFolderError
from mim_refiner.evaluation.features import own_image_size, resolve_blocks, resolve_poolings
from mim_refiner.files import read_json, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import check_image_size
from mim_refiner.types import BackboneInfo, BlockOutput, ImageSize, height_width

POOLINGS = ("cls", "mean", "patches")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
KEEP_EVERY = 8  # batches: so much is computed again after an interruption


@dataclass(frozen=True)
class FeatureSpec:
    """Which features, and everything that decides their bits."""

    block: int  # of a resolved one from 0
    pooling: str | None  # "cls", "mean", "patches"; None: what the authors pool by, mostly cls, else the mean
    norm: bool
    image_size: ImageSize | None  # pixels; None: the encoder's own
    batch_size: int
    precision: Literal["fp32", "bf16"]
    dtype: str  # as stored: "float32", "float16"

    def resolved(self, info: BackboneInfo) -> FeatureSpec:
        """With what the encoder decides filled in; raises InputError for what it cannot give."""
        pooling = self.pooling or (info.pooling if info.has_cls else "mean")
        if pooling not in POOLINGS:
            raise InputError(f"pooling {pooling!r} is unknown; use {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}")
        if pooling != "patches":
            resolve_poolings([pooling], info)
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; use {' or '.join(DTYPES)}")
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size} must be at least 1")
        [block] = resolve_blocks([self.block], info.depth)
        size = self.image_size or own_image_size(info)
        check_image_size(height_width(size), info.patch_size)
        return replace(self, block=block, pooling=pooling, image_size=size)

    def transform(self, info: BackboneInfo) -> dict[str, Any]:
        """How an image becomes the encoder's input, in words that a program reads."""
        size = self.image_size or own_image_size(info)
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

    def take(self, output: BlockOutput) -> Tensor:
        """[B, D], or [B, N, D] for patches, on the CPU in the stored type."""
        values = output.patches if self.pooling == "patches" else output.pooled(str(self.pooling))
        return values.float().to(DTYPES[self.dtype]).cpu()


@dataclass(frozen=True)
class Embedding:
    """``features`` [n, ...] of the n images that could be read, and their numbers ``indices`` [n]."""

    features: NDArray[Any]
    indices: NDArray[np.int64]
    images_per_s: float  # of this call; 0 when there was nothing to do


def compute_features(
    backbone: Backbone, images: ImageSet, spec: FeatureSpec, run: Run, folder: Path | None = None
) -> Embedding:
    """Features of all images, one pass. ``spec`` is a resolved one.

    With ``folder`` the rows are mapped to features.npy there, and the next call goes on after what done.json says: a
    batch holds the same images in every call, and so the bits are those of an uninterrupted one.
    Raises DataError for features that are not finite or more than 10 % unreadable images, RunFolderError for a full
    disk.
    """
    size = spec.image_size or own_image_size(backbone.info)
    first, rows = _kept(folder, images)
    total, done = len(images), first
    filled = first - sum(index < first for index in images.unreadable_indices)
    started = time.perf_counter()
    run.reporter.phase("images", total)
    backbone.to(run.device)
    batches = eval_batches(images, size, spec.batch_size, indices=np.arange(first, total))
    with evaluation_mode(backbone), torch.inference_mode():
        for number, (batch, positions) in enumerate(batches, 1):
            inputs = normalize(batch.to(run.device, non_blocking=True), backbone.info.mean, backbone.info.std)
            with run.autocast():
                [output] = backbone.forward_blocks(inputs, [spec.block], norm=spec.norm)
            found = spec.take(output)
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
            run.reporter.update(done, {"images_per_s": (done - first) / (time.perf_counter() - started)})
    if rows is None:
        raise DataError(f"{images.description}: no image could be read; give a source with whole images")
    _keep(folder, rows, total, images)
    speed = (total - first) / (time.perf_counter() - started)
    return Embedding(rows[:filled], np.setdiff1d(np.arange(total), images.unreadable_indices), speed)


def _room(folder: Path | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if folder is None:
        return np.empty(shape, dtype)
    try:
        rows = np.lib.format.open_memmap(folder / "features.npy", "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a mapped file with holes kills the process when the disk is full
            with open(folder / "features.npy", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        needed = math.prod(shape) * dtype.itemsize / 1e9
        raise RunFolderError(
            f"{folder}: {needed:.3g} GB for the features cannot be taken ({error.strerror}); make room on its disk, or "
            "choose another --out"
        ) from error
    return rows


def _keep(folder: Path | None, rows: NDArray[Any], done: int, images: ImageSet) -> None:
    """The rows first, then how many images they are of."""
    if folder is not None:
        rows.flush()  # type: ignore[attr-defined]  # a memory map
        lost = [item for item in images.unreadable_items() if item[0] < done]
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
