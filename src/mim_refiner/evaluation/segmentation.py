"""Segmentation protocol: a linear probe on patch tokens, scored by sliding window and mIoU (method section 6).

BatchNorm without parameters and a 1x1 convolution on the concatenated tokens of several blocks; the encoder is frozen,
so the tokens of all windows are computed once. A patch's loss is the mean cross-entropy over its labelled pixels (the
logits repeated over the patch); for scoring the logits are upsampled bilinearly and averaged where windows overlap.
"""

from __future__ import annotations

import itertools
import logging
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mim_refiner.core.device import free_memory
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.masks import Mask, MaskSet
from mim_refiner.errors import InputError
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.linear_probe import ProbeSettings, shuffled
from mim_refiner.evaluation.windows import Encoder, Windows
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
    encoder = Encoder(backbone.to(run.device), segmentation_blocks(backbone.info.depth, settings), settings.norm, run)
    stride = max(1, round(settings.stride * window))
    room = 0.5 * free_memory(torch.device("cpu")) if settings.memory_gb is None else settings.memory_gb * 1e9

    def windows(images: ImageSet, **targets: Any) -> Windows:
        found = Windows(images, encoder, window, stride, settings.short_side, **targets)
        if found.bytes <= room:
            found.hold(batch_size, cache)
        return found

    probe = DenseProbe(encoder.width, classes, settings, run)
    probe.fit(windows(train, masks=train_masks, classes=classes))
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
