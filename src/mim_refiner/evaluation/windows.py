"""Sliding windows and their patch tokens: held where they fit, else by batch (ADE20K in a ViT-L: 390 GB of tokens)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.masks import Mask, MaskSet
from mim_refiner.data.workers import decoding_threads, in_background
from mim_refiner.evaluation.cache import FeatureCache, identity_of
from mim_refiner.evaluation.features import block_outputs
from mim_refiner.models.backbone import Backbone


@dataclass(frozen=True)
class Encoder:
    """What turns windows into tokens: some blocks of an encoder, concatenated."""

    backbone: Backbone
    blocks: Sequence[int]
    norm: bool
    run: Run

    @property
    def width(self) -> int:
        return sum(self.backbone.block_dims[block] for block in self.blocks)

    def __call__(self, pixels: Tensor) -> Tensor:
        """float16 [B, P, D] on the device of uint8 windows [B, 3, window, window]."""
        with evaluation_mode(self.backbone), torch.inference_mode():
            outputs = block_outputs(self.backbone, pixels, self.blocks, self.run, norm=self.norm)
            return torch.cat([output.patches for output in outputs], dim=2).to(torch.float16)


class Windows:
    """The windows of all readable images. ``places`` int64 [W, 3]: image, top, left, image by image.

    ``window`` and ``stride`` in pixels; images and masks are first resized to ``short_side``, at least a window.
    """

    def __init__(
        self,
        images: ImageSet,
        encoder: Encoder,
        window: int,
        stride: int,
        short_side: int | None = None,
        *,
        masks: MaskSet | None = None,
        classes: int = 0,
    ) -> None:
        self.images, self.encoder, self.masks, self.classes = images, encoder, masks, classes
        self.window, self.stride, self.short_side = window, stride, short_side
        self.patch = encoder.backbone.info.patch_size
        self.grid = window // self.patch[0], window // self.patch[1]  # of a window's patches
        self.held: tuple[Tensor, Tensor] | None = None
        with ThreadPoolExecutor(decoding_threads()) as pool:
            loaded = pool.map(images.try_load, range(len(images)))
            shapes = [None if pixels is None else self._size(*pixels.shape[:2]) for pixels in loaded]
        images.raise_if_too_many_unreadable()
        places = [(index, *place) for index, shape in enumerate(shapes) if shape
                  for place in window_places(*shape, window, stride)]  # fmt: skip
        self.places = torch.tensor(places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def bytes(self) -> int:
        """What all tokens and targets take."""
        return len(self) * math.prod(self.grid) * 2 * (self.encoder.width + self.classes)

    def hold(self, batch_size: int, cache: FeatureCache | None) -> None:
        """Compute all tokens and targets now, or take the tokens from the cache."""
        encoder, patches, tokens = self.encoder, math.prod(self.grid), None
        if cache is not None:
            transform = [self.window, self.stride, self.short_side]
            how = {"transform": transform, "blocks": list(encoder.blocks), "norm": encoder.norm}
            identity = identity_of("windows", encoder.backbone, self.images, encoder.run, **how)
            tokens = (cache.get(identity) or {}).get("tokens")
        targets = torch.empty(len(self), patches, self.classes, dtype=torch.int16)
        if tokens is None:
            tokens = torch.empty(len(self), patches, encoder.width, dtype=torch.float16)
            for rows, fresh, counts in self._computed(torch.arange(len(self)).split(batch_size)):
                tokens[rows], targets[rows] = fresh.cpu(), counts
                encoder.run.reporter.progress(int(rows[-1]) + 1, {})
            if cache is not None:
                cache.put(identity, {"tokens": tokens, "places": self.places})
        elif self.masks is not None:
            for rows, _, counts in self._loaded(torch.arange(len(self)).split(batch_size), pixels=False):
                targets[rows] = counts
        self.held = tokens, targets

    def batches(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(rows, tokens float16 [B, P, D] on the device, int16 counts of labelled pixels by class [B, P, C])."""
        if self.held is None:
            yield from self._computed(parts)
            return
        for rows in parts:
            yield rows, self.held[0][rows].to(self.encoder.run.device), self.held[1][rows]

    def _computed(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with contextlib.closing(in_background(self._loaded(parts), 2)) as stream:
            for rows, pixels, counts in stream:
                yield rows, self.encoder(pixels), counts

    def _loaded(
        self, parts: Iterable[Tensor], *, pixels: bool = True
    ) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """(rows, uint8 [B, 3, window, window], counts [B, P, C]); an image is decoded once a batch."""
        with ThreadPoolExecutor(decoding_threads()) as pool:
            for rows in parts:
                places = self.places[rows].tolist()
                chosen = list(dict.fromkeys(place[0] for place in places))
                load = partial(self._sized, self.images.load, Image.Resampling.BICUBIC)
                whole = dict(zip(chosen, pool.map(load, chosen), strict=True)) if pixels else {}
                cut = [self._cut(whole[index], place) for index, *place in places if pixels]
                counts = torch.empty(len(rows), math.prod(self.grid), 0, dtype=torch.int16)
                if self.masks is not None:
                    load = partial(self._sized, self.masks.load, Image.Resampling.NEAREST)
                    masks = dict(zip(chosen, pool.map(load, chosen), strict=True))
                    how = self.patch, self.classes, self.masks.ignore_index
                    counts = torch.stack([patch_targets(self._cut(masks[i], place), *how) for i, *place in places])
                stacked = np.stack(cut).transpose(0, 3, 1, 2) if cut else np.empty(0, np.uint8)
                yield rows, torch.from_numpy(np.ascontiguousarray(stacked)), counts

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image as it is cut."""
        short = max(self.short_side or min(height, width), self.window)
        return round(height * short / min(height, width)), round(width * short / min(height, width))

    def _sized(self, load: Callable[[int], NDArray[np.uint8]], how: Image.Resampling, index: int) -> NDArray[np.uint8]:
        array = load(index)
        height, width = self._size(*array.shape[:2])
        same = (height, width) == array.shape[:2]
        return array if same else np.asarray(Image.fromarray(array).resize((width, height), how))

    def _cut(self, array: NDArray[np.uint8], place: Sequence[int]) -> NDArray[np.uint8]:
        return array[place[0] : place[0] + self.window, place[1] : place[1] + self.window]


def window_places(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Top-left corners (top, left) of windows that cover an image, the last ones flush with its border."""
    tops = [*range(0, height - window, stride), height - window]
    lefts = [*range(0, width - window, stride), width - window]
    return [(top, left) for top in tops for left in lefts]


def patch_targets(mask: Mask, patch: tuple[int, int], classes: int, ignore: int) -> Tensor:
    """How many pixels of every class a patch has: int16 [P, C]."""
    rows, columns = mask.shape[0] // patch[0], mask.shape[1] // patch[1]
    tiles = mask.reshape(rows, patch[0], columns, patch[1]).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    valid = (tiles != ignore) & (tiles < classes)
    cells = np.arange(len(tiles))[:, None] * classes + tiles
    counts = np.bincount(cells[valid], minlength=len(tiles) * classes)
    return torch.from_numpy(counts.reshape(len(tiles), classes).astype(np.int16))
