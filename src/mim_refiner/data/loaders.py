"""Batches: multi-crop training batches that any step of any epoch reproduces, and plain evaluation batches."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mim_refiner.data.channels import common_type, resize
from mim_refiner.data.decode import ImageSet, Pixels
from mim_refiner.data.resident import SHARE, ResidentImages
from mim_refiner.data.views import ViewSpec, crop_batch, draws, epoch_order, scale_reduction
from mim_refiner.data.workers import WORKER_BYTES, decoding_threads, end_workers, in_background, watched
from mim_refiner.errors import DataError, InputError
from mim_refiner.reporting import number_of
from mim_refiner.types import ImageSize, default_crop_ratio, height_width

Indices = Sequence[int] | NDArray[np.int64] | Tensor | None  # of images; None: all
_AHEAD = 2  # batches made before they are asked for, by every process
_ELONGATED = 4  # times longer than wide: the view is resized alone, or the cost would grow with the length


class ViewBatch(NamedTuple):
    """One training batch: ``views[v]`` [B, C, size, size], uint8 or, from 16-bit images, uint16.

    A damaged image is replaced by another: ``sample_ids`` and ``labels`` are of those shown. ``skipped``: (name,
    reason) of those found unreadable since the last batch (of a loader's first: all that are known).
    """

    views: list[Tensor]
    sample_ids: Tensor  # int64 [B]
    labels: Tensor | None  # int64 [B]
    skipped: Sequence[tuple[str, str]] = ()


# What a worker sends: the batch or the one-line error that ends the run, and the failures that it knows.
_Assembled = tuple[ViewBatch | str, list[tuple[int, str, str]]]


def _pinned(item: _Assembled) -> _Assembled:
    """In page-locked memory, as what a DataLoader with processes gives: else the host would wait for the copies."""
    batch, unreadable = item
    if isinstance(batch, str):
        return item
    views = [view.pin_memory() for view in batch.views]
    labels = None if batch.labels is None else batch.labels.pin_memory()
    return ViewBatch(views, batch.sample_ids.pin_memory(), labels), unreadable


@dataclass
class _Assembler(Dataset[_Assembled]):
    """Builds the batch of (epoch, step); the same in the main process and in a worker."""

    images: ImageSet
    views: list[ViewSpec]  # one a view
    batch_size: int  # of all ranks
    local_size: int
    offset: int  # of this rank's part in a batch
    seed: int
    reduced_decode: bool
    rows: NDArray[np.int64] | None
    resident: ResidentImages | None

    def __getitem__(self, key: tuple[int, int]) -> _Assembled:
        try:
            return self._batch(*key), self.images.unreadable
        except DataError as error:  # a raised error would reach the user with the worker's traceback in its text
            return str(error), self.images.unreadable

    def _batch(self, epoch: int, step: int) -> ViewBatch:
        order = epoch_order(self.seed, epoch, len(self.images)) if self.rows is None else self.rows
        position = step * self.batch_size + self.offset
        chosen = order[position : position + self.local_size]
        drawn = [draws(self.seed, epoch, view, position, len(chosen)) for view in range(len(self.views))]
        loaded = []
        for row, index in enumerate(chosen.tolist()):
            reduction = partial(scale_reduction, self.views, [each[row : row + 1] for each in drawn])
            loaded.append(self.images.load_resolved(index, reduction if self.reduced_decode else None))
        ids = np.array([image.index for image in loaded], dtype=np.int64)
        labels = None if self.images.labels is None else torch.from_numpy(self.images.labels[ids])
        if self.resident is not None:
            views = self.resident.views(ids, self.views, drawn)
        else:
            pixels, shapes = [image.pixels for image in loaded], [image.shape for image in loaded]
            views = [
                crop_batch(pixels, spec, uniforms, shapes) for spec, uniforms in zip(self.views, drawn, strict=True)
            ]
        return ViewBatch(views, torch.from_numpy(ids), labels)


class TrainLoader:
    """Shuffled multi-crop batches; the last incomplete batch of an epoch is dropped.

    Every random choice is a function of (seed, epoch, position in the epoch): any number of workers, and an epoch
    entered at any step, give the same batches. ``batch_size`` counts the images of all ranks; rank r gets the r-th
    part. ``workers`` > 0 assembles in that many processes, which live until ``close``; 0 in a thread. A worker that is
    killed, or gives nothing for ``timeout`` seconds (0: for ever), is a WorkerError in ``epoch``; ``restart`` makes new
    ones. ``reduced_decode``: JPEGs so large that no view needs all pixels are decoded at 1/2, 1/4 or 1/8. ``resident``:
    images on a device, where views are cut. ``rows``: these images in this order, every epoch, none dropped. Raises
    DataError for a batch larger than the set or too many unreadable images, InputError for sizes that do not fit.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Sequence[ViewSpec],
        batch_size: int,
        seed: int,
        workers: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        timeout: float = 0,
        reduced_decode: bool = False,
        rows: NDArray[np.int64] | None = None,
        resident: ResidentImages | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0 or not views:
            sizes = f"batch size {batch_size}, {number_of(workers, 'workers')} and {number_of(len(views), 'views')}"
            raise InputError(f"{sizes} do not make a loader; give at least 1, 0 and 1")
        if batch_size % world_size:
            raise InputError(f"batch size {batch_size} is not a multiple of {world_size} processes; choose one that is")
        if batch_size > len(images) and rows is None:
            remedy = f"set batch_size to {len(images)} or less" if len(images) > 1 else "give more images"
            raise DataError(
                f"batch size {batch_size} is larger than the data set of {number_of(len(images), 'images')} "
                f"({images.description}); {remedy}"
            )
        images.raise_if_too_many_unreadable()
        self.images, self.views, self.batch_size = images, list(views), batch_size
        self.steps_per_epoch = len(images) // batch_size if rows is None else -(-len(rows) // batch_size)
        each, local = [spec for spec in views for _ in range(spec.count)], batch_size // world_size
        self._assembler = _Assembler(
            images, each, batch_size, local, rank * local, seed, reduced_decode, rows, resident
        )
        workers = 0 if resident else workers  # nothing to decode, and the device cuts while the host goes on
        self._reported: set[int] = set()
        self._steps: list[tuple[int, int]] = []  # sampler of the (epoch, step) keys still to come
        self._closed = False
        self.workers, self._pin_memory, self._timeout = workers, pin_memory, timeout
        self._loader = self._make_loader() if workers else None

    def _make_loader(self) -> DataLoader[Any]:
        fork = sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()
        return DataLoader(
            self._assembler,
            batch_size=None,
            sampler=self._steps,
            num_workers=self.workers,
            prefetch_factor=_AHEAD,
            persistent_workers=True,
            pin_memory=self._pin_memory,
            timeout=self._timeout,
            multiprocessing_context="fork" if fork else None,
            generator=torch.Generator(),  # or the loader would consume the global generator's numbers
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch, None, None]:
        """Yield the batches of ``epoch`` from ``start_step`` on."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        keys = [(epoch, step) for step in range(start_step, self.steps_per_epoch)]
        made = (self._assembler[key] for key in keys)
        if self._loader is not None:
            self._steps[:] = keys
            made = watched(self._loader)
        elif self._assembler.resident is None:
            made = in_background((_pinned(item) for item in made) if self._pin_memory else made, _AHEAD)
        with contextlib.closing(made):
            for batch, unreadable in made:
                self.images.add_unreadable(unreadable)
                if isinstance(batch, str):
                    raise DataError(batch)
                self.images.raise_if_too_many_unreadable()
                fresh = [(name, why) for index, name, why in self.images.unreadable if index not in self._reported]
                self._reported.update(index for index, *_ in self.images.unreadable)
                yield batch._replace(skipped=fresh)

    def first(self, images: int) -> ViewBatch:
        """The first images of epoch 0, made here and now: to see what a batch costs."""
        batch, _ = replace(self._assembler, batch_size=images, local_size=images, offset=0)[0, 0]
        if isinstance(batch, str):
            raise DataError(batch)
        return batch

    def held_bytes(self, device: torch.device) -> int:
        """Of ``device``'s memory: the set that lies there; on the host also waiting batches and loader processes."""
        resident = self._assembler.resident
        there = 0 if resident is None else resident.pixels.nbytes
        if device.type != "cpu":
            return there
        batch = self._assembler.local_size * self.images.channels
        batch *= sum(math.prod(height_width(view.size)) for view in self._assembler.views)
        waiting = 1 if resident else 1 + _AHEAD * max(1, self.workers)
        return there + self.images.nbytes + waiting * batch + self.workers * WORKER_BYTES

    @property
    def cut_where(self) -> str:
        """Where views are cut, in words, with the rule that decides it."""
        if (resident := self._assembler.resident) is not None:
            return f"on the device, which holds all images ({resident.pixels.nbytes / 1e9:.2f} GB)"
        rule = f"on a GPU, where 8-bit images decoded in memory take up to {SHARE:.0%} of its free memory, padded alike"
        return f"on the CPU (images_on_device=auto cuts them {rule})"

    def restart(self) -> None:
        """Replace the worker processes, after one was killed or hung."""
        end_workers(self._loader)
        self._loader = self._make_loader() if self.workers else None

    def close(self) -> None:
        """End the worker processes; the loader cannot be used afterwards. The garbage collector does the same."""
        self._loader = None
        self._closed = True


def resize_center_crop(pixels: Pixels, image_size: ImageSize, crop_ratio: float) -> Pixels:
    """Resize the shorter side to round(image_size / crop_ratio), bicubic, and cut out the centre: [S, S, C].

    For a size (H, W) that is no square the whole image is resized to it: [H, W, C].
    """
    height, width = pixels.shape[:2]
    if not isinstance(image_size, int):
        same = (height, width) == image_size
        return pixels if same else resize(pixels, image_size[1], image_size[0])
    short = round(image_size / crop_ratio)
    if min(height, width) != short:
        elongated = max(height, width) > _ELONGATED * min(height, width)
        long = int(short * max(height, width) / min(height, width))
        height, width = (long, short) if width <= height else (short, long)
        pixels = pixels if elongated else resize(pixels, width, height)
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    if pixels.shape[:2] != (height, width):
        return _view_of(pixels, top, left, image_size, (height, width))
    return pixels[top : top + image_size, left : left + image_size]


def _view_of(pixels: Pixels, top: int, left: int, side: int, resized: tuple[int, int]) -> Pixels:
    """A square of the ``resized`` image at the cost of the square: from the part of the pixels that it depends on."""
    cuts, box = [], []
    for start, new, old in ((top, resized[0], pixels.shape[0]), (left, resized[1], pixels.shape[1])):
        first, last, reach = start * old / new, (start + side) * old / new, 3 * max(1.0, old / new)
        begin, end = max(0, math.floor(first - reach)), min(old, math.ceil(last + reach))
        cuts.append(slice(begin, end))
        box.append((max(0.0, first - begin), min(end - begin, last - begin)))
    (upper, lower), (near, far) = box
    return resize(pixels[cuts[0], cuts[1]], side, side, (near, upper, far, lower))


def decoded_batches(
    images: ImageSet, indices: Indices, batch_size: int, prepare: Callable[[Pixels], Pixels]
) -> Generator[tuple[list[Pixels | None], NDArray[np.int64]], None, None]:
    """(``prepare`` of the pixels of each image or None where it cannot be read, their indices) in order, by threads."""
    wanted = np.arange(len(images)) if indices is None else np.asarray(indices, dtype=np.int64)

    def load(index: int) -> Pixels | None:
        pixels = images.try_load(index)  # at full scale, as in the published protocols
        return None if pixels is None else prepare(pixels)

    with ThreadPoolExecutor(decoding_threads()) as pool:
        apply: Callable[..., Any] = map if images.cached else pool.map
        for start in range(0, len(wanted), batch_size):
            chosen = wanted[start : start + batch_size]
            loaded = list(apply(load, chosen.tolist()))
            images.raise_if_too_many_unreadable()
            yield loaded, chosen


def eval_batches(
    images: ImageSet, image_size: ImageSize, batch_size: int, indices: Indices = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (uint8 [B, 3, H, W], their indices int64 [B]) in order, every image once, without unreadable ones.

    So take labels by the indices that come with the batch. Raises DataError when more than 10 % cannot be read.
    """
    if min(batch_size, *height_width(image_size)) < 1:
        raise InputError(f"batch size {batch_size} and image size {image_size} must be at least 1")
    images.raise_if_too_many_unreadable()
    crop = partial(resize_center_crop, image_size=image_size, crop_ratio=default_crop_ratio(image_size))

    def stacked() -> Generator[tuple[Tensor, Tensor], None, None]:
        for loaded, chosen in decoded_batches(images, indices, batch_size, crop):
            readable = np.array([pixels is not None for pixels in loaded])
            if readable.any():
                batch = np.stack(common_type([pixels for pixels in loaded if pixels is not None]))
                planes = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
                yield planes, torch.from_numpy(chosen[readable])

    with contextlib.closing(in_background(stacked(), 2)) as stream:
        yield from stream
