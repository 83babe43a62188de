"""Segmentation protocol: a linear probe on patch tokens, scored by sliding window and mIoU (method section 6).

BatchNorm without parameters and a 1x1 convolution on the concatenated tokens of several blocks; the encoder is frozen,
so the tokens of all windows are computed once. A patch's loss is the mean cross-entropy over its labelled pixels (the
logits repeated over the patch); for scoring the logits are upsampled bilinearly and averaged where windows overlap.
The windows' tokens are held where they fit, else computed by batch (ADE20K in a ViT-L: 390 GB of tokens).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from mim_refiner.core.device import free_memory
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.masks import Mask, MaskSet
from mim_refiner.data.workers import decoding_threads, in_background
from mim_refiner.errors import InputError
from mim_refiner.evaluation.cache import FeatureCache, identity_of
from mim_refiner.evaluation.features import block_outputs
from mim_refiner.evaluation.linear_probe import ProbeSettings, shuffled
from mim_refiner.models.backbone import Backbone
from mim_refiner.settings import Decay, NonNegative, Positive, PositiveInt, Side


class SegmentationSettings(ProbeSettings):
    """``window`` (pixels, None: the encoder's image size) and ``stride`` (share of it) of the sliding window.

    ``short_side`` resizes images and masks first (None: as they are, at least a window). ``count`` blocks, every
    ``every``-th from the last. The optimiser's values are those of the published code's per-block probe. Tokens that
    need more than ``memory_gb`` (None: half of what is free) are computed anew in every epoch, to the same effect.
    """

    window: Side | None = None
    stride: Annotated[float, Field(gt=0, le=1)] = 2 / 3
    short_side: Side | None = None
    every: PositiveInt = 4
    count: PositiveInt = 4
    norm: bool = False
    batch_size: PositiveInt = 64  # windows
    lr: Positive = 0.1  # for 256 windows a step
    momentum: Decay = 0.9
    memory_gb: NonNegative | None = None


def segmentation_blocks(depth: int, settings: SegmentationSettings) -> tuple[int, ...]:
    """Every n-th block counted from the last, ascending: 3, 7, 11 of 12."""
    return tuple(sorted(range(depth - 1, -1, -settings.every)[: settings.count]))


def segmentation_protocol(
    backbone: Backbone,
    train: ImageSet,
    test: ImageSet,
    settings: SegmentationSettings | None = None,
    *,
    batch_size: int = 64,
    run: Run | None = None,
    cache: FeatureCache | None = None,
) -> NDArray[np.int64]:
    """Train on ``train``, count pixels of ``test``: [N, C (truth), C (predicted)]. DataError without masks."""
    settings, run = settings or SegmentationSettings(), run or Run()
    window = check_segmentation(settings, backbone)
    train_masks, test_masks = MaskSet(train.source), MaskSet(test.source)
    classes = same_classes(train_masks, test_masks)
    blocks, stride = segmentation_blocks(backbone.info.depth, settings), max(1, round(settings.stride * window))
    room = 0.5 * free_memory(torch.device("cpu")) if settings.memory_gb is None else settings.memory_gb * 1e9

    def windows(images: ImageSet, **targets: Any) -> Windows:
        how: dict[str, Any] = {"norm": settings.norm, "short_side": settings.short_side, "run": run}
        found = Windows(images, backbone, blocks, window, stride, **how, **targets)
        if found.bytes <= room:
            found.hold(batch_size, cache)
        return found

    seen = windows(train, masks=train_masks, classes=classes)
    probe = DenseProbe(seen.width, classes, settings, run)
    probe.fit(seen)
    return _confusions(probe, windows(test), test_masks, classes, batch_size)


def same_classes(train: MaskSet, test: MaskSet) -> int:
    """Number both masks by the classes that occur; returns how many. One that ``train`` lacks counts as missed."""
    known, asked = train.class_numbers(), test.class_numbers()
    unknown = np.setdiff1d(asked, known)
    if len(unknown):
        shown = ", ".join(map(str, unknown[:5].tolist()))
        where = f"{test.source.description}: its masks hold class {shown}, which no training mask holds"
        logging.getLogger("mim_refiner").warning("%s: counted as missed", where)
    numbers = np.concatenate([known, unknown])
    for masks in (train, test):
        masks.renumber(numbers)
    return len(numbers)


class DenseProbe:
    """BatchNorm without parameters and one linear map from tokens [.., D] to classes."""

    def __init__(self, dim: int, classes: int, settings: SegmentationSettings, run: Run) -> None:
        self.settings, self.run = settings, run
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6).to(run.device)
        generator = torch.Generator().manual_seed(run.seed)
        self.weight = (torch.randn(dim, classes, generator=generator) * settings.init_std).to(run.device)
        self.bias = torch.zeros(classes, device=run.device)

    @torch.no_grad()
    def fit(self, windows: Windows) -> None:
        """SGD over batches of windows, an incomplete last one of an epoch is dropped."""
        settings, count = self.settings, len(windows)
        batch_size = min(settings.batch_size, count)
        total = settings.epochs * (count // batch_size)
        moving = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.norm.train()
        batches = windows.batches(shuffled(count, batch_size, settings.epochs, self.run.seed))
        for step, (_, tokens, targets) in enumerate(batches):
            normed = self.norm(tokens.float().flatten(0, 1))
            counts = targets.to(self.run.device).float().flatten(0, 1)
            pixels = counts.sum().clamp_min(1)
            # gradient of the pixels' mean cross-entropy
            error = ((normed @ self.weight + self.bias).softmax(1) * counts.sum(1, keepdim=True) - counts) / pixels
            rate = settings.rate(step, total, settings.lr, batch_size)
            gradients = normed.T @ error, error.sum(0)
            for parameter, gradient, velocity in zip((self.weight, self.bias), gradients, moving, strict=True):
                velocity.mul_(settings.momentum).add_(gradient)
                parameter.sub_(rate * velocity)
            if windows.held is None:
                self.run.reporter.progress(step + 1, {})
        self.norm.eval()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[W, P, C] of tokens [W, P, D], on the CPU."""
        flat = self.norm(tokens.to(self.run.device).float().flatten(0, 1)) @ self.weight + self.bias
        return flat.view(*tokens.shape[:2], -1).cpu()


def _confusions(
    probe: DenseProbe, windows: Windows, masks: MaskSet, classes: int, batch_size: int
) -> NDArray[np.int64]:
    """Pixel counts [N, C, C] of every test image, at the size of its own mask."""
    window, confusions = windows.window, []
    images, counts = windows.places[:, 0].unique_consecutive(return_counts=True)
    parts = [rows.split(batch_size) for rows in torch.arange(len(windows)).split(counts.tolist())]
    stream = windows.batches(itertools.chain.from_iterable(parts))
    for image, of_image in zip(images.tolist(), parts, strict=True):
        height, width = (windows.places[torch.cat(of_image), 1:].amax(0) + window).tolist()
        total, seen = torch.zeros(classes, height, width), torch.zeros(height, width)
        for rows, tokens, _ in itertools.islice(stream, len(of_image)):
            logits = probe.logits(tokens).transpose(1, 2).unflatten(2, windows.grid)
            for part, (_, top, left) in zip(logits, windows.places[rows].tolist(), strict=True):
                part = F.interpolate(part[None], size=(window, window), mode="bilinear", align_corners=False)[0]
                total[:, top : top + window, left : left + window] += part
                seen[top : top + window, left : left + window] += 1
        truth, mean = masks.load(image), (total / seen)[None]
        if mean.shape[2:] != truth.shape:
            mean = F.interpolate(mean, size=truth.shape, mode="bilinear", align_corners=False)
        confusions.append(confusion(truth, mean[0].argmax(0).numpy(), classes, masks.ignore_index))
    return np.stack(confusions)


def confusion(truth: Mask, predicted: NDArray[np.int64], classes: int, ignore: int) -> NDArray[np.int64]:
    """Pixel counts [C (truth), C (predicted)] over labelled pixels."""
    labelled = (truth != ignore) & (truth < classes)
    pairs = truth[labelled].astype(np.int64) * classes + predicted[labelled]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def check_segmentation(settings: SegmentationSettings, backbone: Backbone) -> int:
    """Return the window in pixels; raise InputError for one that the patch size does not divide."""
    window, patch = settings.window or min(backbone.info.image_size), backbone.info.patch_size
    if window % patch[0] or window % patch[1]:
        raise InputError(f"segmentation.window {window} must be a multiple of the patch size {patch[0]}x{patch[1]}")
    return window


class Windows:
    """The windows of all readable images and their tokens: those of some ``blocks`` of an encoder, concatenated.

    ``places`` int64 [W, 3]: image, top, left, image by image. ``window`` and ``stride`` in pixels; images and masks are
    first resized to ``short_side``, at least a window.
    """

    def __init__(
        self,
        images: ImageSet,
        backbone: Backbone,
        blocks: Sequence[int],
        window: int,
        stride: int,
        *,
        norm: bool,
        run: Run,
        short_side: int | None = None,
        masks: MaskSet | None = None,
        classes: int = 0,
    ) -> None:
        self.images, self.masks, self.classes = images, masks, classes
        self.backbone, self.blocks, self.norm, self.run = backbone.to(run.device), blocks, norm, run
        self.window, self.stride, self.short_side = window, stride, short_side
        self.width = sum(backbone.block_dims[block] for block in blocks)
        self.patch = backbone.info.patch_size
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
        return len(self) * math.prod(self.grid) * 2 * (self.width + self.classes)

    def hold(self, batch_size: int, cache: FeatureCache | None) -> None:
        """Compute all tokens and targets now, or take the tokens from the cache."""
        patches, tokens = math.prod(self.grid), None
        if cache is not None:
            transform = [self.window, self.stride, self.short_side]
            how = {"transform": transform, "blocks": list(self.blocks), "norm": self.norm}
            identity = identity_of("windows", self.backbone, self.images, self.run, **how)
            tokens = (cache.get(identity) or {}).get("tokens")
        targets = torch.empty(len(self), patches, self.classes, dtype=torch.int16)
        if tokens is None:
            tokens = torch.empty(len(self), patches, self.width, dtype=torch.float16)
            for rows, fresh, counts in self._computed(torch.arange(len(self)).split(batch_size)):
                tokens[rows], targets[rows] = fresh.cpu(), counts
                self.run.reporter.progress(int(rows[-1]) + 1, {})
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
            yield rows, self.held[0][rows].to(self.run.device), self.held[1][rows]

    def _computed(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with contextlib.closing(in_background(self._loaded(parts), 2)) as stream:
            for rows, pixels, counts in stream:
                with evaluation_mode(self.backbone), torch.inference_mode():
                    outputs = block_outputs(self.backbone, pixels, self.blocks, self.run, norm=self.norm)
                    tokens = torch.cat([output.patches for output in outputs], dim=2).to(torch.float16)
                yield rows, tokens, counts

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
