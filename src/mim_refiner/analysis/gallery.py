"""What an encoder finds alike, as pictures: neighbours, clusters, patch features and a map of a few hundred images.

Measured while the models are at hand and written as JSON; the report draws it without a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.core.metrics import standardized
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.core.threads import threads_for
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.source_base import evenly
from mim_refiner.data.thumbnails import encode, thumbnail_sheet
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import block_outputs, extract_features, own_image_size, patch_grid
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import number_of

Points = NDArray[np.float64]  # [N, 2]


@dataclass(frozen=True)
class GallerySettings:
    """Bounds of the work: one forward pass of ``images`` images a model, everything else is small beside it."""

    images: int = 600
    queries: int = 12
    neighbors: int = 6
    clusters: int = 10  # number of clusters without labels, and at most so many with labels
    examples: int = 8  # images shown of each cluster
    patch_images: int = 8
    umap: bool = True  # beside PCA, where umap-learn is installed


def make_gallery(
    models: Mapping[str, Backbone],
    images: ImageSet,
    *,
    pooling: str,
    settings: GallerySettings | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Return the JSON record of the gallery of one or more encoders ({"before": ..., "after": ...}).

    Images are taken evenly spaced from the set, queries and patch images evenly from those: nothing is picked by its
    result. Features are those of the last block, compared as in k-NN: standardised by dimension, L2-normalised, cosine.
    Numbers such as ``neighbors`` are rows of ``items``. Raises DataError with fewer than three readable images.
    """
    settings, run = settings or GallerySettings(), run or Run()
    wanted = evenly(len(images), settings.images).tolist()
    rows = np.array([index for index in wanted if images.try_load(index) is not None], dtype=np.int64)
    if len(rows) < 3:
        few = f"{number_of(len(rows), 'readable images')} {'is' if len(rows) == 1 else 'are'} too few to compare"
        raise DataError(f"{images.description}: {few}; give at least 3")
    labels = None if images.labels is None else images.labels[rows]
    shown = evenly(len(rows), settings.queries)
    patch_rows = shown[: settings.patch_images]
    found: dict[str, dict[str, Any]] = {}
    kept: dict[str, float] = {}  # share of the first model's neighbours that each later one keeps
    first_map: Points | None = None
    first_near: list[list[int]] = []
    for name, backbone in models.items():
        features = extract_features(backbone, images, blocks=(-1,), poolings=(pooling,), run=run, indices=rows)
        prepared = standardized(features[-1, pooling].double()).numpy()
        tokens, grid = patch_tokens(backbone, images, rows[patch_rows], run)
        with threads_for(max(prepared.size, tokens.size) * prepared.shape[1]):
            maps = feature_maps(prepared, run.seed, first_map, umap=settings.umap)
            lists = neighbor_lists(prepared, labels, settings.neighbors)
            if first_map is None:
                first_map, first_near = maps["pca"]["points"], lists["neighbors"]
            else:
                pairs = zip(first_near, lists["neighbors"], strict=True)
                kept[name] = float(np.mean([len({*a} & {*b}) / max(1, len(a)) for a, b in pairs]))
            found[name] = {
                **lists,
                **{key: [lists[key][row] for row in shown] for key in ("neighbors", "similarity")},
                "clusters": cluster_images(prepared, labels, settings, run.seed),
                "maps": {key: {**each, "points": np.round(each["points"], 4).tolist()} for key, each in maps.items()},
                "patches": patch_maps(tokens, grid),
            }
    return {
        "kind": "gallery",
        "data": {"source": images.description, "images": len(images), "shown": len(rows)},
        "block": next(iter(models.values())).info.depth - 1,
        "pooling": pooling,
        "seed": run.seed,
        "version": __version__,
        "thumbnails": thumbnail_sheet(images, rows.tolist()),
        "items": {
            "name": [images.source.name(int(index)) for index in rows],
            "label": None if labels is None else labels.tolist(),
        },
        "class_names": list(images.class_names) if images.class_names else None,
        "queries": shown.tolist(),
        "patch_rows": patch_rows.tolist(),
        "kept_neighbors": kept,
        "models": found,
    }


def neighbor_lists(features: NDArray[np.float64], labels: NDArray[np.int64] | None, count: int) -> dict[str, Any]:
    """The ``count`` nearest other images of every image with their cosine, and how often they share its label."""
    similarity = features @ features.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(count, len(features) - 1)]
    values = np.take_along_axis(similarity, nearest, axis=1)
    same = None if labels is None else float((labels[nearest] == labels[:, None]).mean())
    return {"neighbors": nearest.tolist(), "similarity": np.round(values, 3).tolist(), "same_label": same}


def cluster_images(
    features: NDArray[np.float64], labels: NDArray[np.int64] | None, settings: GallerySettings, seed: int
) -> dict[str, Any]:
    """k-means; of every cluster its size and the images nearest to its centre, with labels the table of counts.

    Clusters come in the order of the classes they match best (Hungarian), or by size without labels.
    """
    classes = None if labels is None else np.unique(labels)
    wanted = settings.clusters if classes is None else min(len(classes), settings.clusters)
    k = max(1, min(wanted, len(features) // 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters: some stay empty
        found = KMeans(k, n_init=5, random_state=seed).fit(features)
    members, distance = found.labels_, found.transform(features)
    order, confusion = np.argsort(-np.bincount(members, minlength=k), kind="stable"), None
    if classes is not None:
        counts = np.array([[int(((members == c) & (labels == y)).sum()) for y in classes] for c in range(k)])
        matched_cluster, matched_class = linear_sum_assignment(counts, maximize=True)
        order = matched_cluster[np.argsort(matched_class)]
        confusion = {"classes": classes.tolist(), "counts": counts[order].tolist()}
    nearest = [np.flatnonzero(members == c) for c in order]
    nearest = [row[np.argsort(distance[row, c], kind="stable")] for row, c in zip(nearest, order, strict=True)]
    return {
        "sizes": [len(row) for row in nearest],
        "examples": [row[: settings.examples].tolist() for row in nearest],
        "confusion": confusion,
    }


def feature_maps(
    features: NDArray[np.float64], seed: int, like: Points | None = None, *, umap: bool = True
) -> dict[str, dict[str, Any]]:
    """Two-dimensional maps: PCA, and UMAP where it is installed. Axes are mirrored to resemble ``like``."""
    centred = features - features.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    points = left[:, :2] * singular[:2]
    share = singular**2 / max(float((singular**2).sum()), 1e-12)
    maps: dict[str, dict[str, Any]] = {"pca": {"points": _mirrored(points, like), "explained": share[:2].tolist()}}
    if umap and find_spec("umap") is not None and len(features) > 20:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TensorFlow, which it can do without, and its number of threads
            from umap import UMAP

            found = UMAP(n_neighbors=15, metric="cosine", random_state=seed).fit_transform(features)
        maps["umap"] = {"points": np.asarray(found, float)}
    return maps


def _mirrored(points: Points, like: Points | None) -> Points:
    """Each axis with the sign that goes best with ``like``; alone, with its longer tail to the positive side."""
    reference = points**3 if like is None else like * points
    signs = np.where(reference.sum(0) < 0, -1.0, 1.0)
    return points * signs


def patch_tokens(
    backbone: Backbone, images: ImageSet, indices: NDArray[np.int64], run: Run
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """Patch tokens [images, patches, D] of the last block, and the grid (rows, columns) that they lie on."""
    size, tokens = own_image_size(backbone.info), list[Tensor]()
    with evaluation_mode(backbone), torch.inference_mode():
        for batch, _ in eval_batches(images, size, 8, indices=indices):
            tokens.append(block_outputs(backbone, batch, [-1], run)[0].patches.float().cpu())
    values = torch.cat(tokens).double().numpy()
    return values, patch_grid(backbone, size, values.shape[1])


def patch_maps(values: NDArray[np.float64], grid: tuple[int, int]) -> dict[str, Any]:
    """First three principal components of patch tokens [images, patches, D] as red, green and blue, a small PNG each.

    The components are those of all these images' tokens together; each is scaled to its 2nd and 98th percentile.
    Colours mean nothing across models. Returns {"grid": [rows, columns], "png": [base64], "explained": [3 shares]}.
    """
    count, patches, width = values.shape
    flat = values.reshape(-1, width)
    flat = flat - flat.mean(0)
    spread, directions = np.linalg.eigh(flat.T @ flat)
    colours = _mirrored(flat @ directions[:, ::-1][:, :3], None)
    low, high = np.percentile(colours, [2, 98], axis=0)
    scaled = ((colours - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    pixels = (255 * scaled).round().astype(np.uint8).reshape(count, patches, -1)
    explained = spread[::-1][:3] / max(float(spread.sum()), 1e-12)
    return {
        "grid": list(grid),
        "png": [encode(picture.reshape(*grid, 3), "PNG") for picture in pixels],
        "explained": explained.tolist(),
    }
