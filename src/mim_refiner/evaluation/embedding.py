"""Features of a whole data set, in parts on disk: memory does not grow with the data, an interruption loses little."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import default_crop_ratio, eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.feature_parts import Part, PartFolder
from mim_refiner.evaluation.features import own_image_size, resolve_blocks, resolve_poolings
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import check_image_size
from mim_refiner.types import BackboneInfo, BlockOutput, ImageSize, height_width

POOLINGS = ("cls", "mean", "patches")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
PART_BATCHES, PART_BYTES = 8, 64 * 2**20  # a part ends at whichever is less, but holds one batch at least


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
    part_images: int  # images of the data a part covers, a multiple of the batch

    @classmethod
    def choose(
        cls,
        info: BackboneInfo,
        *,
        block: int,
        pooling: str | None,
        norm: bool,
        image_size: ImageSize | None,
        batch_size: int,
        precision: Literal["fp32", "bf16"],
        dtype: str,
    ) -> FeatureSpec:
        """Fill in what the encoder decides; raises InputError for what it cannot give.

        ``pooling`` None takes what the encoder's authors pool by: mostly the class token, else the mean.
        """
        if pooling is None:
            pooling = info.pooling if info.has_cls else "mean"
        if pooling not in POOLINGS:
            raise InputError(f"pooling {pooling!r} is unknown; use {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}")
        if pooling != "patches":
            resolve_poolings([pooling], info)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown; use {' or '.join(DTYPES)}")
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} must be at least 1")
        [number] = resolve_blocks([block], info.depth)
        size = image_size or own_image_size(info)
        sides = height_width(size)
        check_image_size(sides, info.patch_size)
        patches = (sides[0] // info.patch_size[0]) * (sides[1] // info.patch_size[1]) if pooling == "patches" else 1
        batch_bytes = batch_size * patches * info.embed_dim * DTYPES[dtype].itemsize
        part_images = batch_size * max(1, min(PART_BATCHES, PART_BYTES // batch_bytes))
        return cls(number, pooling, norm, size, batch_size, precision, dtype, part_images)

    def transform(self, info: BackboneInfo) -> dict[str, Any]:
        """How an image becomes the encoder's input, in words that a program reads."""
        size = self.image_size
        cut = (
            {"resize": list(size)}
            if isinstance(size, tuple)
            else {"resize_shorter_side": round(size / default_crop_ratio(size)), "center_crop": size}
        )
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
        values = output.patches if self.pooling == "patches" else output.pooled(self.pooling)
        return values.float().to(DTYPES[self.dtype]).cpu()


def compute_parts(
    backbone: Backbone,
    images: ImageSet,
    spec: FeatureSpec,
    parts: PartFolder,
    run: Run,
) -> float:
    """Compute every part that ``parts`` lacks; return images/s of this call (0 when there was nothing to do).

    A batch holds the same images in every call, so a continued run gives the bits of an uninterrupted one.
    Raises DataError for features that are not finite, or more than 10 % unreadable images.
    """
    total = len(images)
    ranges = [range(start, min(start + spec.part_images, total)) for start in range(0, total, spec.part_images)]
    missing = [number for number in range(len(ranges)) if not parts.has(number)]
    done = total - sum(len(ranges[number]) for number in missing)
    for number in set(range(len(ranges))) - set(missing):
        images.add_unreadable(parts.unreadable(number))
    run.reporter.phase("images", total)
    if not missing:
        return 0.0
    backbone.to(run.device)
    writer = _Writer(images, ranges, missing, parts)
    first, started = done, time.perf_counter()
    wanted = np.concatenate([np.asarray(ranges[number]) for number in missing])
    with evaluation_mode(backbone), torch.inference_mode():
        for batch, positions in eval_batches(images, spec.image_size, spec.batch_size, indices=wanted):
            inputs = normalize(batch.to(run.device, non_blocking=True), backbone.info.mean, backbone.info.std)
            with run.autocast():
                [output] = backbone.forward_blocks(inputs, [spec.block], norm=spec.norm)
            writer.add(spec.take(output), positions, spec)
            done = first + int(np.searchsorted(wanted, int(positions[-1]), side="right"))
            run.reporter.update(done, {"images_per_s": (done - first) / (time.perf_counter() - started)})
        writer.finish()
    return len(wanted) / (time.perf_counter() - started)


class _Writer:
    """Collects batches and writes a part as soon as a batch of a later one arrives."""

    def __init__(self, images: ImageSet, ranges: Sequence[range], missing: list[int], parts: PartFolder) -> None:
        self.images, self.ranges, self.pending, self.parts = images, ranges, list(missing), parts
        self.features: list[Tensor] = []
        self.indices: list[Tensor] = []

    def add(self, features: Tensor, positions: Tensor, spec: FeatureSpec) -> None:
        if not bool(torch.isfinite(features).all()):
            raise DataError(
                f"{self.images.description}: {spec.pooling} features of block {spec.block} hold NaN or infinity near "
                f"image {int(positions[0])}; check the checkpoint, or use --precision fp32 --dtype float32"
            )
        while int(positions[0]) not in self.ranges[self.pending[0]]:
            self._write()
        self.features.append(features)
        self.indices.append(positions)

    def finish(self) -> None:
        while self.pending:
            self._write()

    def _write(self) -> None:
        number = self.pending.pop(0)
        covered = self.ranges[number]
        unreadable = [item for item in self.images.unreadable_items() if item[0] in covered]
        features = torch.cat(self.features).numpy() if self.features else None
        indices = torch.cat(self.indices).numpy() if self.indices else np.empty(0, dtype=np.int64)
        self.parts.write(number, Part(features, indices), unreadable)
        self.features, self.indices = [], []
