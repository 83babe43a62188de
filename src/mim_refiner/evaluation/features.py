"""Frozen features: one forward pass of an image set for all blocks, poolings and norms asked for, or none if cached."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.core.collectives import from_rank_0, from_ranks, gather_rows, is_distributed, rank, world_size
from mim_refiner.core.modules import device_of, evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import Indices, eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.cache import FeatureCache, identity_of
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter
from mim_refiner.types import BackboneInfo, BlockOutput, ImageSize, default_crop_ratio, height_width, side_or_pair

POOLINGS = ("cls", "mean")
FeatureKey = tuple[int, str]  # (block, counted from 0; pooling)


@dataclass(frozen=True)
class Features:
    """Pooled features of N images on the CPU, rows in one order; looked up by negative blocks too: ``[-1, "mean"]``."""

    values: Mapping[FeatureKey, Tensor]  # float32 [N, D]
    labels: Tensor | None  # int64 [N]
    indices: Tensor  # int64 [N], which image of the set a row is; unreadable images are left out
    depth: int

    def __getitem__(self, key: FeatureKey) -> Tensor:
        block, pooling = key
        return self.values[block % self.depth, pooling]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def keys(self) -> tuple[FeatureKey, ...]:
        """(block, pooling) in the order of extraction."""
        return tuple(self.values)

    def renumbered(self, numbers: Tensor | None) -> Features:
        """Return them with class ``c`` as ``numbers[c]``; None: as they are."""
        return self if numbers is None or self.labels is None else replace(self, labels=numbers[self.labels])

    def of_blocks(self, blocks: Collection[int]) -> Features:
        """Return the features of some blocks."""
        return replace(self, values={key: value for key, value in self.values.items() if key[0] in blocks})

    def select(self, rows: Tensor | NDArray[np.int64]) -> Features:
        """Return the features of some rows."""
        rows = torch.as_tensor(rows)
        labels = None if self.labels is None else self.labels[rows]
        values = {key: value[rows] for key, value in self.values.items()}
        return Features(values, labels, self.indices[rows], self.depth)


@dataclass(frozen=True)
class ImageTransform:
    """How the images of a set become uint8 batches [B, 3, H, W] and their positions in the set [B].

    ``name`` says everything that the pixels depend on (with all numbers and seeds): it is part of a cache entry's key.
    ``batches`` takes (images, image size, batch size, indices or None), as ``data.loaders.eval_batches``.
    """

    name: str
    batches: Callable[..., Iterator[tuple[Tensor, Tensor]]]


CENTRE_CROP = ImageTransform(
    "centre crop", lambda images, size, batch, indices: eval_batches(images, size, batch, indices=indices)
)


def extract_features(backbone: Backbone, images: ImageSet, *, norm: bool = False, **options: Any) -> Features:
    """Pool the tokens after each block by each pooling, in one forward pass, images in order.

    ``norm`` applies the final norm to every block output; ``options`` as of :func:`feature_sets`, which gives features
    with and without it at once. Same inputs, same bits on one machine.
    """
    return feature_sets(backbone, images, norms=(norm,), **options)[norm]


def feature_sets(
    backbone: Backbone,
    images: ImageSet,
    *,
    blocks: str | Sequence[int] = "all",
    poolings: Sequence[str] | None = None,
    norms: Sequence[bool] = (False, True),
    image_size: ImageSize | None = None,
    batch_size: int = 256,
    run: Run | None = None,
    indices: Indices = None,
    transform: ImageTransform = CENTRE_CROP,
    cache: FeatureCache | None = None,
    phase: str = "",
) -> dict[bool, Features]:
    """Features of every block and pooling, for each of ``norms`` (False: raw tokens, True: the final norm applied).

    Images are resized and centre-cropped to ``image_size`` (the encoder's own when None) unless ``transform`` says
    otherwise, and normalised as the encoder wants it. Without any block they are only read: which can be, and their
    labels. With ``cache`` every (block, pooling, norm) found there is read and only the rest is computed, in one
    forward pass. The backbone is moved to the device of ``run`` (None: stays where it is, float32), runs in eval mode,
    and gets every module's mode back. ``phase`` is what the run's reporter is told, "": nothing.
    In a distributed run every process must call it: each computes a part (of centre crops), rank 0 keeps the cache, and
    all get the whole. Raises InputError for an unknown block or pooling, DataError for non-finite features or > 10 %
    unreadable images.
    """
    keys = [
        (block, pooling, bool(norm))
        for norm in dict.fromkeys(norms)
        for block in (resolve_blocks(blocks, backbone.info.depth) if len(blocks) else ())
        for pooling in resolve_poolings(poolings, backbone.info)
    ]
    run = run or Run(device_of(backbone))
    run = run if phase else replace(run, reporter=Reporter())
    backbone.to(run.device)
    size = image_size or own_image_size(backbone.info)
    chosen = None if indices is None else np.asarray(indices, dtype=np.int64)
    wanted = np.arange(len(images)) if chosen is None else chosen
    run.reporter.phase(phase, len(wanted))
    cache = cache if rank() == 0 else None
    identities: dict[_FullKey, dict[str, Any]] = {}
    found: dict[_FullKey, dict[str, Tensor] | None] = {}
    if cache is not None:
        hashed = "all" if chosen is None else hashlib.sha256(np.ascontiguousarray(chosen).tobytes()).hexdigest()
        made_by = [transform.name, size, default_crop_ratio(size)]
        whole = identity_of("pooled", backbone, images, run, rows=hashed, transform=made_by)
        identities = {key: {**whole, "block": key[0], "pooling": key[1], "norm": key[2]} for key in keys}
        found = {key: cache.get(identity) for key, identity in identities.items()}
    known = {key: entry for key, entry in from_rank_0(found).items() if entry is not None}
    missing = [key for key in keys if key not in known]
    if missing or not keys:

        def forward(part: NDArray[np.int64] | None) -> tuple[dict[_FullKey, Tensor], Tensor]:
            batches = transform.batches(images, size, batch_size, part)
            return _forward(backbone, batches, missing, len(wanted if part is None else part), run)

        # other transforms draw by an image's place in the call
        spread = is_distributed() and transform is CENTRE_CROP
        values, rows = _spread(forward, images, wanted) if spread else forward(chosen)
        for key in missing:
            known[key] = {"features": values[key], "rows": rows}
            if cache is not None:
                cache.put(identities[key], known[key])
    else:
        rows = known[keys[0]]["rows"]
    lost = np.setdiff1d(wanted, rows.numpy()).tolist()  # found in the cache: nobody has tried to read them now
    images.add_unreadable((index, images.source.name(index), "could not be read before") for index in lost)
    labels = None if images.labels is None else torch.from_numpy(images.labels[rows.numpy()])
    by_norm: dict[bool, dict[FeatureKey, Tensor]] = {bool(norm): {} for norm in norms}
    for block, pooling, normed in keys:
        by_norm[normed][block, pooling] = known[block, pooling, normed]["features"]
    return {norm: Features(of, labels, rows, backbone.info.depth) for norm, of in by_norm.items()}


_FullKey = tuple[int, str, bool]  # block, pooling, norm


def _spread(
    forward: Callable[[NDArray[np.int64]], tuple[dict[_FullKey, Tensor], Tensor]],
    images: ImageSet,
    wanted: NDArray[np.int64],
) -> tuple[dict[_FullKey, Tensor], Tensor]:
    """Let every rank compute its part of the (different) images; all get the whole, or the same error."""
    share = -(-len(wanted) // world_size())
    part = np.resize(wanted, (world_size(), share))[rank()]  # equal: the ranks of a sharded encoder stay abreast
    try:
        values, rows, problem = *forward(part), ""
    except DataError as error:
        values, rows, problem = {}, torch.empty(0), str(error)
    problem = next(filter(None, from_ranks(problem)), "")
    if problem:
        raise DataError(problem)
    images.add_unreadable(item for items in from_ranks(images.unreadable) for item in items)
    rows = gather_rows(rows)
    first = torch.from_numpy(np.sort(np.unique(rows.numpy(), return_index=True)[1]))  # what fills up the last part goes
    return {key: gather_rows(value)[first] for key, value in values.items()}, rows[first]


def _forward(
    backbone: Backbone, batches: Iterator[tuple[Tensor, Tensor]], keys: Sequence[_FullKey], total: int, run: Run
) -> tuple[dict[_FullKey, Tensor], Tensor]:
    """One pass over the images for all ``keys``: {key: float32 [N, D]} and the positions of the rows [N]."""
    wanted = list(dict.fromkeys(key[0] for key in keys))
    alone = all(pooling == "cls" for block, pooling, _ in keys if block == max(wanted))
    buffers: dict[_FullKey, Tensor] = {}
    seen: list[Tensor] = []
    done = 0
    with evaluation_mode(backbone), torch.inference_mode():
        for batch, positions in batches:
            rows = slice(done, done + len(positions))
            if keys:
                found = block_outputs(backbone, batch, wanted, run, class_token_last=alone)
                outputs = dict(zip(wanted, found, strict=True))
                with run.autocast():
                    normed = {key[0]: _normed(backbone, outputs[key[0]]) for key in keys if key[2]}
            for block, pooling, norm in keys:
                pooled = (normed if norm else outputs)[block].pooled(pooling).float().cpu()
                if (block, pooling, norm) not in buffers:
                    with torch.inference_mode(False):  # an ordinary tensor, free to be trained on later
                        buffers[block, pooling, norm] = torch.empty(total, pooled.shape[1])
                buffers[block, pooling, norm][rows] = pooled
            seen.append(positions)
            done = rows.stop
            run.reporter.progress(done, {})
    if not seen:
        raise DataError("no image to compute features of; give at least one readable image")
    values = {key: buffer[:done] for key, buffer in buffers.items()}  # unreadable images have no row
    for (block, pooling, _), value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"{pooling} features of block {block} hold NaN or infinity; check the checkpoint, or use fp32 precision"
            )
    return values, torch.cat(seen)


def block_outputs(
    backbone: Backbone, pixels: Tensor, blocks: Sequence[int], run: Run, **how: bool
) -> list[BlockOutput]:
    """``forward_blocks`` of images [B, C, H, W] as they were read, normalised on the run's device, in its precision."""
    inputs = inputs_of(backbone, pixels, run)
    with run.autocast():
        return backbone.forward_blocks(inputs, blocks, **how)


def inputs_of(backbone: Backbone, pixels: Tensor, run: Run) -> Tensor:
    """Images [B, C, H, W] as they were read, normalised as the encoder wants it, on the run's device."""
    return normalize(pixels.to(run.device, non_blocking=True), backbone.info.mean, backbone.info.std)


def _normed(backbone: Backbone, output: BlockOutput) -> BlockOutput:
    cls = None if output.cls is None else backbone.final_norm(output.cls[:, None])[:, 0]
    return BlockOutput(cls=cls, patches=backbone.final_norm(output.patches))


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


def patch_grid(backbone: Backbone, size: ImageSize, patches: int) -> tuple[int, int]:
    """Rows and columns of so many patches of an image; hierarchical encoders end on a coarser grid."""
    rows, columns = backbone.grid_of(height_width(size))
    side = math.isqrt(patches)
    return (rows, columns) if rows * columns == patches else (side, patches // side)


def own_image_size(info: BackboneInfo) -> ImageSize:
    """The size of the images that the encoder is made for."""
    return side_or_pair(info.image_size)
