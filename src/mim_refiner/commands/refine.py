"""``refine``: both phases of MIM-Refiner in one run folder, then before and after."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.comparison import SUMMARY_TEST_LIMIT, SUMMARY_TRAIN_LIMIT, compare, thinned
from mim_refiner.commands.loggers import logging_to
from mim_refiner.commands.monitor import OnlineKnn
from mim_refiner.commands.report import finish_with_report, write_gallery
from mim_refiner.commands.runs import list_skipped, open_images, refuse_to_overwrite_inputs, run_settings
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.data.views import ViewSpec, multi_crop_views
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.suite import class_numbers
from mim_refiner.export.timm import export_timm
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.models.vit import check_image_size
from mim_refiner.reporting import NullReporter, Reporter
from mim_refiner.training.recipe import RefineRecipe, override
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.refinement import Refinement
from mim_refiner.training.state import RunFolder
from mim_refiner.training.trainer import LoopSettings, fit


def refine(
    *,
    data: str,
    model: str,
    out: str,
    recipe: str | None = None,
    eval_data: str | None = None,
    eval_test: str | None = None,
    settings: list[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    exclude: str | None = None,
    log: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Refine the encoder ``model`` on the images ``data`` (labels optional) and compare it with what it was.

    Head warm-up on the frozen encoder, then refinement (paper section 3.3). ``eval_data``/``eval_test``: labelled
    images to measure on; without them the labels of ``data``, if any, are used. ``exclude``: list of images to leave
    out (as doctor writes it). ``log``: further loggers (tensorboard, wandb, mlflow). The same call on the same folder
    resumes. Returns the summary {"before", "after", "verdict", "seconds"}, also in summary.json; export/ is a timm
    folder. Raises MimRefinerError with one line on bad input.
    """
    with logging_to(log, out, reporter or NullReporter()) as told:
        return refine_and_compare(
            data=data,
            model=model,
            out=out,
            recipe=recipe,
            eval_data=eval_data,
            eval_test=eval_test,
            settings=settings or [],
            device=device,
            seed=seed,
            overwrite=overwrite,
            exclude=exclude,
            reporter=told,
        )


def refine_and_compare(
    *,
    data: str,
    model: str,
    out: str,
    recipe: str | None,
    eval_data: str | None,
    eval_test: str | None,
    settings: list[str],
    device: str,
    seed: int,
    overwrite: bool,
    reporter: Reporter,
    exclude: str | None = None,
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Do what :func:`refine` says; ``others`` are further encoders {stage: source} to measure beside."""
    started = time.perf_counter()
    torch_device = pick_device(device)
    backbone = load_backbone(model)
    images = open_images(data, reporter, channels=backbone.info.in_chans, exclude=exclude)
    refuse_to_overwrite_inputs(out, overwrite, data=data, model=model, eval_data=eval_data, eval_test=eval_test)
    chosen = resolve(override(refine_recipe(recipe, image_size=max(backbone.info.image_size)), settings), backbone)
    precision = resolve_precision(chosen.precision, torch_device)
    bank, test = evaluation_sets(images, eval_data, eval_test, reporter)
    if torch_device.type == "cpu":
        backbone.use_math_attention()
    if chosen.compile:
        backbone.compile_blocks()
    torch.manual_seed(seed)
    refiner = make_refiner(backbone, chosen).to(torch_device)
    ema = ExponentialMovingAverage(backbone)
    views = view_specs(chosen)
    loader = TrainLoader(images, views, chosen.batch_size, seed, **run_settings(images, chosen, torch_device))
    resolved = {"command": "refine", "data": data, "model": model, "seed": seed, **chosen.model_dump(mode="json")}
    resolved["data_fingerprint"] = images.source.fingerprint()
    if exclude is not None:
        resolved["exclude"] = exclude
    run = RunFolder.open(out, resolved, overwrite=overwrite, keep_checkpoints=chosen.keep_checkpoints)
    skipped = list_skipped(images, run, reporter)
    announce(chosen, backbone, len(images), loader.steps_per_epoch, precision, reporter)

    photometrics = [
        BatchPhotometric(view, backbone.info.mean, backbone.info.std) for view in views for _ in range(view.count)
    ]
    job = Refinement(
        refiner, ema, chosen, loader, photometrics, device=torch_device, precision=precision, labels=images.labels
    )
    monitor = None
    if bank.labels is not None and chosen.knn_every:
        monitor = OnlineKnn(
            backbone,
            bank,
            test,
            blocks=refiner.blocks,
            pooling=chosen.heads.pooling,
            device=torch_device,
            precision=precision,
        )
    loop = LoopSettings(seed, torch_device, chosen.log_every, chosen.checkpoint_every, chosen.knn_every)
    with contextlib.closing(loader):
        fit(job.phases(), {"model": refiner, "ema": ema}, run, loop, reporter, monitor)
    list_skipped(images, run, reporter, skipped)
    trained = time.perf_counter() - started

    refined = ema.module if chosen.export_weights == "ema" else backbone
    assert isinstance(refined, Backbone)
    stages = {"before": load_backbone(model), "after": refined}
    stages |= {stage: load_backbone(source) for stage, source in (others or {}).items()}
    summary = conclude(
        stages, bank, test, chosen, run, f"{Path(data).name} ({len(images)} images)", torch_device, seed, reporter
    )
    summary["seconds"] = {"training": trained, "total": time.perf_counter() - started}
    write_json(run.path / "summary.json", summary)
    finish_with_report(run.path, reporter)
    reporter.done()
    return summary


def make_refiner(backbone: Backbone, recipe: RefineRecipe) -> Refiner:
    """The encoder with its heads; raises InputError for a batch that the queues cannot hold."""
    heads = recipe.heads
    if recipe.batch_size > heads.queue_size:
        raise InputError(
            f"batch_size {recipe.batch_size} is larger than the queue of {heads.queue_size}; "
            "set a smaller batch_size or a larger heads.queue_size"
        )
    top_k = max(recipe.warmup.top_k, recipe.refinement.top_k)
    if top_k > heads.queue_size:
        raise InputError(
            f"top_k {top_k} is larger than the queue of {heads.queue_size}; "
            "set a smaller refinement.top_k or a larger heads.queue_size"
        )
    config = HeadConfig(heads.projector_hidden, heads.predictor_hidden, heads.out_dim, heads.queue_size)
    blocks = [int(block) for block in heads.blocks]
    return Refiner(backbone, blocks, config, pooling=heads.pooling, frozen_blocks=recipe.frozen_blocks)


def conclude(
    stages: dict[str, Backbone],
    bank: ImageSet,
    test: ImageSet | None,
    recipe: RefineRecipe,
    run: RunFolder,
    data: str,
    device: torch.device,
    seed: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Compare before and after, and export the refined encoder with its figures."""
    summary = compare(
        stages,
        thinned(bank, SUMMARY_TRAIN_LIMIT),
        None if test is None else thinned(test, SUMMARY_TEST_LIMIT),
        pooling=recipe.heads.pooling,
        head_blocks=[int(block) for block in recipe.heads.blocks],
        out=run.path,
        device=device,
        precision="fp32",
        seed=seed,
        reporter=reporter,
    )
    shown = bank if test is None else test
    pooling = recipe.heads.pooling
    write_gallery(stages, shown, run.path, pooling=pooling, device=device, seed=seed, reporter=reporter)
    card = {
        "base": Path(stages["before"].info.source).name,
        "data": data,
        "recipe": recipe.model_dump(mode="json"),
        "before": summary["before"],
        "after": summary["after"],
    }
    recommended = {"block": -1, "pooling": recipe.heads.pooling, "norm": False}
    export_timm(stages["after"].to("cpu"), run.path / "export", card=card, facts=recommended)
    return summary


def resolve(recipe: RefineRecipe, backbone: Backbone) -> RefineRecipe:
    """Replace every "auto" by what the encoder gives; raises InputError for sizes that do not fit its patches."""
    info = backbone.info
    recipe = recipe.model_copy(deep=True)
    if recipe.heads.blocks == "last_third":
        recipe.heads.blocks = list(range(info.depth - max(1, info.depth // 3), info.depth))
    wrong = [block for block in recipe.heads.blocks if not -info.depth <= int(block) < info.depth]
    if wrong:
        raise InputError(
            f"heads.blocks: block {wrong[0]} is out of range; the encoder has blocks 0 to {info.depth - 1}"
        )
    recipe.heads.blocks = sorted({int(block) % info.depth for block in recipe.heads.blocks})
    if recipe.heads.pooling == "auto":
        recipe.heads.pooling = "cls" if info.has_cls else "mean"
    if recipe.views.global_size is None:
        recipe.views.global_size = max(info.image_size)
    for size in (recipe.views.global_size, recipe.views.local_size):
        check_image_size((size, size), info.patch_size)
    return recipe


def view_specs(recipe: RefineRecipe) -> list[ViewSpec]:
    """The recipe's views, global ones first."""
    views = recipe.views
    assert views.global_size is not None
    return multi_crop_views(
        views.global_size,
        views.local_size,
        views.num_local,
        views.global_scale,
        views.local_scale,
        flip=views.flip,
        jitter_prob=views.jitter_prob,
        brightness=0.4 * views.jitter_strength,
        contrast=0.4 * views.jitter_strength,
        saturation=0.2 * views.jitter_strength,
        hue=0.1 * views.jitter_strength,
        blur_prob=views.blur_prob,
        blur_sigma=views.blur_sigma,
        gray_prob=views.gray_prob,
        solarize_prob=views.solarize_prob,
    )


def evaluation_sets(
    images: ImageSet, eval_data: str | None, eval_test: str | None, reporter: Reporter
) -> tuple[ImageSet, ImageSet | None]:
    """The labelled images to measure on: the ones given, else the training images themselves."""
    if eval_test is not None and eval_data is None:
        raise InputError("--eval-test needs --eval-data; give the labelled bank that the test images are compared with")
    bank = images if eval_data is None else open_images(eval_data, reporter, channels=images.channels)
    test = None if eval_test is None else open_images(eval_test, reporter, channels=images.channels)
    for option, given in (("--eval-data", None if eval_data is None else bank), ("--eval-test", test)):
        if given is not None and given.labels is None:
            raise DataError(f"{option}: {given.description} has no labels; give labelled images, or leave {option} out")
    if test is not None:
        class_numbers(bank, test)  # refuses classes that the bank lacks now, not after the training
    return bank, test


def announce(
    recipe: RefineRecipe, backbone: Backbone, images: int, steps_per_epoch: int, precision: str, reporter: Reporter
) -> None:
    """Say what is about to run: sizes, and base and peak learning rate of both phases."""
    info, heads = backbone.info, recipe.heads
    blocks: Sequence[Any] = heads.blocks
    reporter.message(
        f"recipe {recipe.name}: {info.architecture} ({info.family}), {len(blocks)} heads on blocks {blocks[0]} to "
        f"{blocks[-1]} ({heads.pooling}), {images} images, batch {recipe.batch_size}, "
        f"{steps_per_epoch} steps an epoch, {precision}"
    )
    for name, phase in (("warm-up", recipe.warmup), ("refinement", recipe.refinement)):
        peak = peak_learning_rate(phase.base_lr, recipe.batch_size)
        reporter.message(f"{name}: {phase.epochs} epochs, learning rate base {phase.base_lr:.3g}, peak {peak:.3g}")
