"""Steps that the training commands share: opening the data, loader settings, and the list of skipped images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mim_refiner.checkpoints.options import bare_source
from mim_refiner.core.collectives import decide_on_rank_0, from_ranks, is_distributed, rank, world_size
from mim_refiner.core.device import free_memory, pick_device
from mim_refiner.core.launch import join_processes, refuse_difference
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.duplicates import check_overlap
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.name_lists import list_lines, without_listed
from mim_refiner.data.resident import held_on_device
from mim_refiner.data.source_base import ImageSource, Selection, evenly
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec
from mim_refiner.data.workers import worker_count
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.splits import stratified_split
from mim_refiner.evaluation.suite import class_numbers
from mim_refiner.files import dotted, read_mapping, read_yaml, write_bytes, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter, number_of
from mim_refiner.settings import read_setting
from mim_refiner.training.recipe import Recipe, RefineRecipe
from mim_refiner.training.state import RunFolder, file_sha256, refuse_place

MOMENT_IMAGES = 1000
MOST_HELD_OUT = 5000  # more would narrow the intervals by little
ENDED_FILE = "checkpoints/ended.json"
ENDED = "this run is finished already; what it found stands in summary.json, --overwrite starts anew"
SMALL_PIXELS = 64  # side in pixels up to which images count as small


def join_training(out: str | None, device: str, seed: int, reporter: Reporter) -> Run:
    """Join the processes that train; RunFolderError where ``out`` (None: nothing is written) can be no run folder."""
    run = Run(join_processes(pick_device(device), reporter), seed=seed, reporter=reporter)
    if out is not None:
        decide_on_rank_0(lambda: refuse_place(out))
    return run


def open_images(spec: Any, reporter: Reporter, *, channels: int = 3, exclude: str | None = None) -> ImageSet:
    """Open and, when they fit, decode all images but those listed in ``exclude``, for an encoder of ``channels``."""
    images = ImageSet(open_listed(spec, exclude), channels=channels)
    announce(images.source, reporter)
    return images


def open_pair(data: Any, test: Any, reporter: Reporter, *, channels: int) -> tuple[ImageSet, ImageSet | None]:
    """The images ``data`` and, where any are given, ``test`` images that go with them."""
    train = open_images(data, reporter, channels=channels)
    held_out = open_images(test, reporter, channels=channels) if test else None
    if held_out is not None:
        check_pair(train, held_out, reporter)
    return train, held_out


def training_images(
    spec: Any,
    recipe: RefineRecipe,
    settings: Iterable[str],
    eval_data: Any,
    run: Run,
    channels: int,
    exclude: str | None,
) -> tuple[ImageSet, ImageSet | None]:
    """Images to train on and, where they have labels, the share ``hold_out`` of every class (5,000 at most) to measure
    on: none beside ``eval_data``. Where ``settings`` name a share and none is held out, that is said.
    """
    source, share = open_listed(spec, exclude), recipe.hold_out if eval_data is None else 0.0
    announce(source, run.reporter)
    if share and source.labels is not None and len(np.unique(source.labels)) > 1:
        with contextlib.suppress(DataError):  # too few images, or none of them can be read
            kept, held = stratified_split(source.labels, min(share, MOST_HELD_OUT / len(source)), run.seed)
            parts = {"without the images held out": kept, "images held out": held}
            train, test = (ImageSet(Selection(source, rows, f"{source.description}, {what}"), channels=channels)
                           for what, rows in parts.items())  # fmt: skip
            run.reporter.message(
                f"held out to measure on: {len(test)} of {len(source)} images (seed {run.seed}, the same share of "
                "every class); --eval-data and --eval-test give other images, --set hold_out=0 trains on all"
            )
            return train, test
    if recipe.hold_out and "hold_out" in dict(map(read_setting, settings)):
        why = "--eval-data gives the images to measure on"
        if eval_data is None:
            why = "the images are not labelled with two classes or more, or too few; --eval-data gives others"
        run.reporter.warning(f"--set hold_out={recipe.hold_out} has no effect: {why}")
    return ImageSet(source, channels=channels), None


def open_listed(spec: Any, exclude: str | None) -> ImageSource:
    """The source without the images listed in ``exclude``."""
    source = open_source(spec)
    return source if exclude is None else without_listed(source, exclude)


def announce(source: ImageSource, reporter: Reporter) -> None:
    """Say what the data is, why it has no labels, and what in it is not read."""
    classes, what = source.class_names, [source.description]
    if f"({number_of(len(source), 'images')}" not in source.description:
        what.append(number_of(len(source), "images"))
    if classes is None or f"{len(classes)} class" not in source.description:
        what.append(f"no labels: {source.no_labels}" if classes is None else number_of(len(classes), "classes"))
    reporter.message(f"data: {', '.join(what).replace(', no labels), no labels:', '); no labels:')}")
    for each in source.left_out:
        reporter.message(f"left out of {source.description}: {each}")


def check_pair(train: ImageSet, test: ImageSet, reporter: Reporter) -> None:
    """DataError for test classes that train lacks and for test images that are those of train; a few are told."""
    class_numbers(train, test)
    shared = check_overlap(train.source, test.source)  # on every rank: all see the same, and raise the same
    if shared.count:
        reporter.warning(str(shared))


def tell_trained_on(models: Iterable[str], tested: Any, reporter: Reporter) -> list[str]:
    """Say which of the encoders were trained on the images ``tested``, as far as recipe.yaml of a run folder tells."""
    said, where = [], os.path.abspath(tested) if isinstance(tested, str | os.PathLike) else ""
    for model in models:
        for file in (Path(model) / "recipe.yaml", Path(model).parent / "recipe.yaml"):  # of a run, or of its export/
            data = read_mapping(file, read_yaml).get("data")
            if isinstance(data, str) and os.path.abspath(data) == where:
                text = f"{model} is measured on images it trained on ({file} names {tested}); give others by --test"
                reporter.warning(text)
                said.append(text)
                break
    return said


def tell_unreadable(images: ImageSet, reporter: Reporter, so: str = "left out") -> None:
    """Say how many images could not be read, which, and what comes of it."""
    if bad := images.unreadable:
        some = "; ".join(f"{name}: {reason}" for _, name, reason in bad[:3]) + (", ..." if len(bad) > 3 else "")
        them = f"{len(bad)} of {number_of(len(images), 'images')} of {images.description}"
        reporter.warning(f"{them} cannot be read ({some}): {so}")


def channel_moments(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel on the 0-1 scale, of at most 1,000 evenly spaced images."""
    rows = evenly(len(images), MOMENT_IMAGES).tolist()
    loaded = [pixels for row in rows if (pixels := images.try_load(row)) is not None]
    images.raise_if_too_many_unreadable()
    scaled = [pixels / np.float64(np.iinfo(pixels.dtype).max) for pixels in loaded]
    mean = np.mean([pixels.mean((0, 1)) for pixels in scaled], axis=0)
    square = np.mean([(pixels**2).mean((0, 1)) for pixels in scaled], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-8))  # a channel of one value stays finite
    return tuple(mean.tolist()), tuple(std.tolist())


def normalize_by(images: ImageSet, backbone: Backbone) -> None:
    """From now on the encoder, and what is exported of it, normalises by these images' channels."""
    mean, std = decide_on_rank_0(lambda: channel_moments(images))  # what one process cannot read others may
    backbone.info = replace(backbone.info, mean=mean, std=std)


def run_fast(backbone: Backbone, recipe: Recipe, run: Run) -> None:
    """Prepare the encoder to run as fast as it goes on the device."""
    if run.device.type == "cpu" and run.precision == "bf16":
        backbone.use_math_attention()
    if recipe.compile:
        backbone.compile_blocks()


def refuse_to_overwrite_inputs(out: str, overwrite: bool, **sources: Any) -> None:
    """Raise InputError when ``overwrite`` would delete a source, {option: path}, because it lies inside ``out``."""
    for option, source in sources.items() if overwrite else ():
        if not isinstance(source, str):
            continue
        path = Path(bare_source(source or "").removeprefix("local-dir:").partition("[")[0]).expanduser()
        if source and path.exists() and path.resolve().is_relative_to(Path(out).resolve()):
            flag = "--" + option.replace("_", "-")
            raise InputError(f"{flag} {source} lies in {out}, which --overwrite would delete; choose another --out")


def common_image_size(images: ImageSet) -> int:
    """Side of the (small) images when all probed ones agree, else the field's usual 224 px."""
    sides = {side for index in evenly(len(images), 8).tolist() for side in images.load(index).shape[:2]}
    return sides.pop() if len(sides) == 1 and max(sides) <= SMALL_PIXELS else 224


def train_loader(images: ImageSet, views: Sequence[ViewSpec], recipe: Recipe, run: Run) -> TrainLoader:
    """A background thread for small cached images on few cores, else worker processes."""
    return TrainLoader(
        images,
        views,
        recipe.batch_size,
        run.seed,
        worker_count(recipe.workers, cached=images.cached),
        pin_memory=run.device.type == "cuda",
        timeout=recipe.loader_timeout,
        reduced_decode=recipe.reduced_decode,
        rank=rank(),
        world_size=world_size(),
        resident=held_on_device(recipe.images_on_device, images, run.device, free_memory(run.device)),
    )


def refuse_other_work(recipe: Recipe, run: Run, encoder: str | None, **images: ImageSet | None) -> None:
    """Raise InputError where the processes of a run were not all given the same recipe, seed, encoder and images."""
    refuse_difference(lambda: {
        **dotted(recipe.model_dump(mode="json")), "seed": run.seed, "encoder": encoder,
        **{name: each.source.fingerprint() for name, each in images.items() if each is not None},
    })  # fmt: skip


def open_run(out: str, known: dict[str, Any], reporter: Reporter, overwrite: bool, began: float) -> RunFolder:
    """Create or continue the run folder ``out`` of what it is ``known_by``; ``began``: by ``time.perf_counter``."""
    folder = RunFolder(out, known, overwrite=overwrite)
    folder.began = began
    reporter.opened(folder.path)
    return folder


def known_by(asked: Mapping[str, Any], recipe: Recipe, images: ImageSet) -> dict[str, Any]:
    """What recipe.yaml of a run folder has."""
    given = {key: value for key, value in asked.items() if value is not None} | recipe.model_dump(mode="json")
    return given | {"data_fingerprint": images.source.fingerprint(), "data_images": len(images)}


def ended_run(before: Path | None, asked: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any] | None:
    """The summary of a run in ``before`` that ended, measured as ``asked`` and with all ``files``; else None."""

    def read() -> dict[str, Any] | None:
        path = Path(before or "")
        summary = read_mapping(path / "summary.json")
        if not summary or not all((path / name).exists() for name in files):
            return None
        digest = file_sha256(path / "summary.json")
        known = read_mapping(path / ENDED_FILE) == {"asked": asked, "sha256": digest}
        return summary if known and "stopped" not in summary else None

    return None if before is None else decide_on_rank_0(read)


def write_summary(path: Path, summary: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Write summary.json, and that the run measured what was ``asked`` for."""
    file = write_json(path / "summary.json", summary)
    write_json(path / ENDED_FILE, {"asked": asked, "sha256": file_sha256(file)})


def list_skipped(images: ImageSet, folder: RunFolder, reporter: Reporter, already: int = 0) -> int:
    """List the images that could not be read in skipped_images.txt, say how many if more than ``already``."""
    if is_distributed():  # rank 0 lists those of all
        for items in from_ranks(images.unreadable):
            images.add_unreadable(items)
    if len(images.unreadable) > already:
        if folder.writes:
            write_bytes(folder.path / "skipped_images.txt", list_lines(images.unreadable))
        listed = f"{folder.path}/skipped_images.txt"
        reporter.warning(f"skipped {number_of(len(images.unreadable), 'unreadable images')}; listed in {listed}")
    return len(images.unreadable)
