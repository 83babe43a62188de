"""Frozen features: one forward pass of an image set for all blocks and poolings asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mim_refiner.core.device import autocast, resolve_precision
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.errors import DataError, InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.types import BackboneInfo

POOLINGS = ("cls", "mean")
FeatureKey = tuple[int, str]  # (block, counted from 0; pooling)
Progress = Callable[[int, int], None]  # called with (images done, images in all)


@dataclass(frozen=True)
class Features:
    """Pooled features of N images on the CPU, in one row order for every (block, pooling).

    Look-ups take negative block numbers too: ``features[-1, "mean"]``.
    """

    values: Mapping[FeatureKey, Tensor]  # float32 [N, D]
    labels: Tensor | None  # int64 [N]
    indices: Tensor  # int64 [N], which image of the set a row is; unreadable images are left out
    depth: int
    norm: bool = False

    def __getitem__(self, key: FeatureKey) -> Tensor:
        block, pooling = key
        return self.values[block % self.depth, pooling]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def keys(self) -> tuple[FeatureKey, ...]:
        """(block, pooling) in the order of extraction."""
        return tuple(self.values)

    def select(self, rows: Tensor | NDArray[np.int64]) -> Features:
        """Return the features of some rows."""
        rows = torch.as_tensor(rows)
        labels = None if self.labels is None else self.labels[rows]
        values = {key: value[rows] for key, value in self.values.items()}
        return Features(values, labels, self.indices[rows], self.depth, self.norm)


def extract_features(
    backbone: Backbone,
    images: ImageSet,
    *,
    blocks: str | Sequence[int] = "all",
    poolings: Sequence[str] | None = None,
    norm: bool = False,
    image_size: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    indices: Sequence[int] | NDArray[np.int64] | Tensor | None = None,
    progress: Progress | None = None,
) -> Features:
    """Pool the tokens after each of ``blocks`` by each of ``poolings``, in one forward pass, images in order.

    Images are resized and centre-cropped to ``image_size`` (the encoder's own when None) and normalised as the
    encoder wants it. ``norm`` applies the final norm to every block output. The backbone is moved to ``device`` (None:
    stays where it is), runs in eval mode, and gets every module's mode back. Same inputs, same bits on one machine.
    Raises InputError for an unknown block or pooling, DataError for non-finite features or > 10 % unreadable images.
    """
    block_numbers = resolve_blocks(blocks, backbone.info.depth)
    names = resolve_poolings(poolings, backbone.info)
    device = _device_of(backbone) if device is None else torch.device(device)
    backbone.to(device)
    precision = resolve_precision(precision, device)
    size = image_size or square_image_size(backbone.info)
    total = len(images) if indices is None else len(indices)
    buffers: dict[FeatureKey, Tensor] = {}
    seen: list[Tensor] = []
    done = 0
    with evaluation_mode(backbone), torch.inference_mode():
        for batch, positions in eval_batches(images, size, batch_size, indices=indices):
            inputs = normalize(batch.to(device, non_blocking=True), backbone.info.mean, backbone.info.std)
            with autocast(precision, device):
                outputs = backbone.forward_blocks(inputs, block_numbers, norm=norm)
            rows = slice(done, done + len(positions))
            for block, output in zip(block_numbers, outputs, strict=True):
                for name in names:
                    pooled = output.pooled(name).float().cpu()
                    if (block, name) not in buffers:
                        with torch.inference_mode(False):  # an ordinary tensor, free to be trained on later
                            buffers[block, name] = torch.empty(total, pooled.shape[1])
                    buffers[block, name][rows] = pooled
            seen.append(positions)
            done = rows.stop
            if progress:
                progress(done, total)
    return _finish(backbone, images, buffers, torch.cat(seen) if seen else None, norm)


def _finish(
    backbone: Backbone, images: ImageSet, buffers: dict[FeatureKey, Tensor], rows: Tensor | None, norm: bool
) -> Features:
    if rows is None:
        raise DataError(f"{images.description}: no image to compute features of; give at least one readable image")
    values = {key: buffer[: len(rows)] for key, buffer in buffers.items()}  # unreadable images have no row
    for (block, name), value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"{images.description}: {name} features of block {block} hold NaN or infinity; "
                "check the checkpoint, or use fp32 precision"
            )
    labels = None if images.labels is None else torch.from_numpy(images.labels[rows.numpy()])
    return Features(values, labels, rows, backbone.info.depth, norm)


def resolve_blocks(blocks: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """``"all"``, ``"-1"``, ``"8,9"`` or integers to block numbers from 0, each once; InputError when out of range."""
    if isinstance(blocks, str):
        try:
            blocks = range(depth) if blocks.strip() == "all" else [int(part) for part in blocks.split(",")]
        except ValueError:
            raise InputError(f"blocks {blocks!r}: give 'all' or block numbers such as 8,9 or -1") from None
    wrong = [block for block in blocks if not -depth <= block < depth]
    if wrong or not len(blocks):
        named = f"{wrong[0]} is out of range" if wrong else "none given"
        raise InputError(f"blocks: {named}; the encoder has blocks 0 to {depth - 1} (or -{depth} to -1), or say 'all'")
    return tuple(dict.fromkeys(block % depth for block in blocks))


def resolve_poolings(poolings: Sequence[str] | None, info: BackboneInfo) -> tuple[str, ...]:
    """Check pooling names; None means all that the encoder has. InputError for unknown ones, or cls without a token."""
    if poolings is None:
        return POOLINGS if info.has_cls else ("mean",)
    names = tuple(dict.fromkeys([poolings] if isinstance(poolings, str) else poolings))
    unknown = [name for name in names if name not in POOLINGS]
    if unknown or not names:
        raise InputError(f"pooling {unknown[0] if unknown else ''!r} is unknown; use {' or '.join(POOLINGS)}")
    if "cls" in names and not info.has_cls:
        raise InputError(f"pooling 'cls': {info.architecture} has no class token; use pooling mean")
    return names


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule has the mode it had (a frozen prefix stays in eval)."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def square_image_size(info: BackboneInfo) -> int:
    """Side of the square images that the encoder is made for; InputError when they are not square."""
    height, width = info.image_size
    if height != width:
        raise InputError(
            f"{info.architecture} is made for {height}x{width} px images; give image_size, a square's side"
        )
    return height
