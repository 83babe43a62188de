"""Patch features before and after, where an option of the refinement is about them: better, worse or no clear change.

With masks: mIoU of the classes that k-NN gives the patches of test images. Without: patch-neighbour agreement, the
share of a patch's nearest patches of other places that two differently coloured copies of it agree on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.analysis.label_free import neighbor_consistency, paired_scores
from mim_refiner.analysis.verdict import word_of
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.metrics import mean_iou, mean_iou_interval
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.masks import MaskSet, has_masks
from mim_refiner.data.photometric import BatchPhotometric, normalize, seeded_generator
from mim_refiner.data.source_base import evenly
from mim_refiner.data.views import ViewSpec
from mim_refiner.evaluation.features import own_image_size
from mim_refiner.evaluation.segmentation import SegmentationSettings, Windows, check_segmentation, same_classes
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import in_points

IMAGES, PATCHES = 256, 16  # images looked at, and patches of each
BANK_PATCHES = 20_000
NEIGHBORS, TEMPERATURE = 10, 0.07
ROUNDING = 2.0**-10  # of half precision, in which features are stored and served


def dense_change(models: Mapping[str, Backbone], bank: ImageSet, test: ImageSet | None, run: Run) -> dict[str, Any]:
    """{"measure", "before", "after", "change": [value, low, high], "verdict", "reason"} of the first two models."""
    stages = list(models)[:2]
    if test is not None and has_masks(bank.source) and has_masks(test.source):
        name = "knn_miou"
        counts = [knn_segmentation(models[stage], bank, test, run) for stage in stages]
        values = [mean_iou(each.sum(0)) for each in counts]
        change = mean_iou_interval(counts[1], counts[0], seed=run.seed)
    else:
        name = "patch_agreement"
        scores = [patch_agreement(models[stage], bank if test is None else test, run) for stage in stages]
        values = [float(each.mean()) for each in scores]
        change = paired_scores(*scores, seed=run.seed)
    word = word_of(*change[1:])
    what = "k-NN segmentation (mIoU)" if name == "knn_miou" else "patch-neighbour agreement (%)"
    return {
        "measure": name,
        **dict(zip(stages, values, strict=True)),
        "change": list(change),
        "verdict": word,
        "reason": f"{word}: {what} {100 * values[0]:.1f} before, {100 * values[1]:.1f} after: {in_points(*change)}",
    }


@torch.inference_mode()
def patch_agreement(backbone: Backbone, images: ImageSet, run: Run) -> NDArray[np.float64]:
    """Agreement [N] of the last block's patches of each of ``images``, thinned to a few hundred.

    What all images have at a place is taken off first, and the copies get noise as large as half precision rounds:
    features that only tell the place, or hardly differ, would agree with themselves. Which patches are looked at and
    how they are coloured depends on the seed alone, so encoders are paired.
    """
    info, size = backbone.info, own_image_size(backbone.info)
    colours = BatchPhotometric(ViewSpec("dense", size, scale=(1.0, 1.0), flip=0.0), info.mean, info.std)
    rows = evenly(len(images), IMAGES)
    seen: list[tuple[Tensor, ...]] = []
    of_place: Tensor | float = 0.0
    backbone.to(run.device)
    with evaluation_mode(backbone):
        for number, (pixels, _) in enumerate(eval_batches(images, size, 64, indices=rows)):
            pixels, draw = pixels.to(run.device), seeded_generator(run.seed, 0, number)
            inputs = normalize(pixels, info.mean, info.std), colours(pixels, draw), colours(pixels, draw)
            with run.autocast():
                tokens = [backbone.forward_blocks(view, [-1], norm=True)[0].patches.float() for view in inputs]
            count = tokens[0].shape[1]
            for copy in tokens[1:]:
                noise = torch.randn(copy.shape, generator=draw).to(copy)
                copy += ROUNDING * copy.square().mean(-1, keepdim=True).sqrt() * noise
            kept = torch.rand(len(pixels), count, generator=draw).argsort(1)[:, :PATCHES].to(run.device)
            of_place = of_place + tokens[0].sum(0)
            seen.append((kept, *(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) for x in tokens)))
    places, *views = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert isinstance(of_place, Tensor)  # no image at all is an error of eval_batches
    clean, first, second = (x - (of_place / len(places))[places] for x in views)  # [images, patches, D]
    shares = neighbor_consistency(*(x.flatten(0, 1) for x in (clean, first, second)), neighbors=NEIGHBORS)
    return shares.reshape(clean.shape[:2]).mean(1)


def knn_segmentation(backbone: Backbone, bank: ImageSet, test: ImageSet, run: Run) -> NDArray[np.int64]:
    """Counts [N, C (truth), C (predicted)] of the labelled pixels of each test image's patches.

    A patch of the bank has the class of most of its pixels; patches without labelled ones are left out.
    """
    masks = MaskSet(bank.source), MaskSet(test.source)
    classes = same_classes(*masks)
    window, (high, wide) = check_segmentation(SegmentationSettings(), backbone), backbone.info.patch_size
    last = [backbone.info.depth - 1]

    def patches(images: ImageSet, of: MaskSet, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features [P, D], counts [P, C] and image [P] of the labelled patches of evenly spaced windows."""
        windows = Windows(images, backbone, last, window, window, norm=True, run=run, masks=of, classes=classes)
        chosen = torch.linspace(0, len(windows) - 1, min(len(windows), most)).long()
        tokens, counts, image = [], [], []
        for rows, found, pixels in windows.batches(chosen.split(32)):
            kept = pixels.sum(2) > 0
            tokens.append(found.cpu().float()[kept])
            counts.append(pixels[kept])
            image.append(windows.places[rows, 0, None].expand(kept.shape)[kept])
        return torch.cat(tokens), torch.cat(counts).long(), torch.cat(image)

    train_x, train_counts, _ = patches(bank, masks[0], -(-BANK_PATCHES // ((window // high) * (window // wide))))
    test_x, test_counts, image = patches(test, masks[1], IMAGES)
    near = min(NEIGHBORS, len(train_x))
    predicted = knn_predict(train_x, train_counts.argmax(1), test_x, k=near, temperature=TEMPERATURE)
    numbers, place = image.unique(return_inverse=True)
    confusions = torch.zeros(len(numbers), classes, classes, dtype=torch.long)
    for number, guess, count in zip(place.tolist(), predicted.tolist(), test_counts, strict=True):
        confusions[number, :, guess] += count
    return confusions.numpy()
