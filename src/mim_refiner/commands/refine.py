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
from mim_refiner.commands.head_blocks import FILE as PLACEMENT_FILE
from mim_refiner.commands.head_blocks import head_block_settings, place_in_recipe
from mim_refiner.commands.loggers import logging_to
from mim_refiner.commands.monitor import OnlineKnn
from mim_refiner.commands.plan import fit_into
from mim_refiner.commands.plan import plan as run_plan
from mim_refiner.commands.report import finish_with_report, write_gallery
from mim_refiner.commands.runs import (
    evaluation_sets,
    list_skipped,
    open_images,
    refuse_to_overwrite_inputs,
    results_folder,
    run_settings,
)
from mim_refiner.commands.survey import How
from mim_refiner.core.collectives import is_distributed
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.launch import join_processes
from mim_refiner.core.layer_decay import negligible_blocks
from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.core.sharding import full_state, is_sharded
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.data.views import ViewSpec, multi_crop_views
from mim_refiner.errors import GuardStopError, InputError, NonFiniteLossError
from mim_refiner.export.timm import export_timm
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.models.vit import check_image_size
from mim_refiner.reporting import NullReporter, Reporter
from mim_refiner.training.guard import FeatureProbe, Guard
from mim_refiner.training.recipe import RefineRecipe, override
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.refinement import Refinement
from mim_refiner.training.signals import stops_cleanly
from mim_refiner.training.state import RunFolder
from mim_refiner.training.step import refuse_batch_dependent
from mim_refiner.training.trainer import LoopSettings, fit


def refine(
    *,
    data: str,
    model: str,
    out: str,
    recipe: str | None = None,
    eval_data: str | None = None,
    eval_test: str | None = None,
    head_blocks: str | None = None,
    settings: list[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    memory_budget: str | None = None,
    plan: bool = False,
    exclude: str | None = None,
    log: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Refine the encoder ``model`` on the images ``data`` (labels optional) and compare it with what it was.

    Head warm-up on the frozen encoder, then refinement (paper section 3.3). ``eval_data``/``eval_test``: labelled
    images to measure on; without them the labels of ``data``, if any, are used. The same call on the same folder
    resumes. ``head_blocks``: "auto" places the heads by measurement (``analysis.placement``), "last_third" or block
    numbers such as "8,9" overrule the recipe. ``memory_budget`` ("24GB", "auto") picks micro_batch and checkpointing so
    that a step fits; ``plan`` only returns what the run would need and cost. ``exclude``: list of images to leave out
    (as doctor writes it). ``log``: further loggers (tensorboard, wandb, mlflow). Returns the summary {"before",
    "after", "verdict", "recommendation", "seconds"}, also in summary.json; export/ is a timm folder. Raises
    MimRefinerError with one line on bad input, GuardStopError when the guard stopped the run (export/ then holds the
    best state).
    """
    with logging_to(log, out, reporter or NullReporter()) as told:
        return refine_and_compare(
            data=data,
            model=model,
            out=out,
            recipe=recipe,
            eval_data=eval_data,
            eval_test=eval_test,
            settings=[*(settings or []), *head_block_settings(head_blocks)],
            device=device,
            seed=seed,
            overwrite=overwrite,
            memory_budget=memory_budget,
            plan=plan,
            exclude=exclude,
            reporter=told,
        )


@stops_cleanly
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
    memory_budget: str | None = None,
    plan: bool = False,
    exclude: str | None = None,
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Do what :func:`refine` says; ``others`` are further encoders {stage: source} to measure beside."""
    started = time.perf_counter()
    torch_device = join_processes(pick_device(device))
    backbone = load_backbone(model)
    images = open_images(data, reporter, channels=backbone.info.in_chans, exclude=exclude)
    refuse_to_overwrite_inputs(out, overwrite, data=data, model=model, eval_data=eval_data, eval_test=eval_test)
    base = refine_recipe(recipe, image_size=max(backbone.info.image_size), images=len(images))
    chosen = override(base, settings)
    precision = resolve_precision(chosen.precision, torch_device)
    bank, test = evaluation_sets(images, eval_data, eval_test, reporter)
    how = How(torch_device, seed, reporter, precision)
    before = None if overwrite else Path(out)
    placement = None if plan else place_in_recipe(chosen, base, backbone, bank, test, how, before)
    chosen = resolve(chosen, backbone)
    if torch_device.type == "cpu":
        backbone.use_math_attention()
    if chosen.compile:
        backbone.compile_blocks()
    torch.manual_seed(seed)
    refiner = make_refiner(backbone, chosen).to(torch_device)
    loader = TrainLoader(
        images, view_specs(chosen), chosen.batch_size, seed, **run_settings(images, chosen, torch_device)
    )
    if plan:
        return run_plan(chosen, refiner, len(images), torch_device, precision, memory_budget)
    if memory_budget is not None:
        chosen = fit_into(chosen, refiner, memory_budget, torch_device, precision, reporter)
    resolved = {"command": "refine", "data": data, "model": model, "seed": seed, **chosen.model_dump(mode="json")}
    resolved["data_fingerprint"] = images.source.fingerprint()
    if exclude is not None:
        resolved["exclude"] = exclude
    run = RunFolder.open(out, resolved, overwrite=overwrite, keep_checkpoints=chosen.keep_checkpoints)
    if placement is not None and run.writes:
        write_json(run.path / PLACEMENT_FILE, placement)
    skipped = list_skipped(images, run, reporter)
    announce(chosen, backbone, len(images), loader.steps_per_epoch, precision, reporter)

    job = make_job(chosen, refiner, loader, images, torch_device, precision)
    monitor = online_knn(refiner, bank, test, chosen, torch_device, precision)
    loop = LoopSettings(seed, torch_device, chosen.log_every, chosen.checkpoint_every, chosen.knn_every)
    with contextlib.closing(loader):
        refined, stopped = train(job, images, run, loop, model, monitor, reporter)
    list_skipped(images, run, reporter, skipped)
    trained = time.perf_counter() - started

    stages = {"before": load_backbone(model), "after": refined}
    stages |= {stage: load_backbone(source) for stage, source in (others or {}).items()}
    described = f"{Path(data).name} ({len(images)} images)"
    with results_folder(run.path) as folder:
        summary = conclude(stages, bank, test, chosen, folder, described, torch_device, seed, reporter)
    if not run.writes:  # the rest is rank 0's
        return {}
    summary["seconds"] = {"training": trained, "total": time.perf_counter() - started}
    more = {"head_placement": placement, "stopped": str(stopped) if stopped else None}
    summary |= {key: value for key, value in more.items() if value is not None}
    write_json(run.path / "summary.json", summary)
    finish_with_report(run.path, reporter)
    reporter.done()
    if stopped:
        raise stopped
    return summary


def make_job(
    recipe: RefineRecipe, refiner: Refiner, loader: TrainLoader, images: ImageSet, device: torch.device, precision: str
) -> Refinement:
    """What the training phases are made of."""
    info = refiner.backbone.info
    photometrics = [
        BatchPhotometric(view, info.mean, info.std) for view in view_specs(recipe) for _ in range(view.count)
    ]
    ema = ExponentialMovingAverage(refiner.backbone)
    if recipe.shard and is_distributed():
        refiner.backbone.shard_blocks()
        ema.module.shard_blocks()  # type: ignore[operator]
    return Refinement(
        refiner, ema, recipe, loader, photometrics, device=device, precision=precision, labels=images.labels
    )


def train(
    job: Refinement,
    images: ImageSet,
    run: RunFolder,
    loop: LoopSettings,
    model: str,
    monitor: OnlineKnn | None,
    reporter: Reporter,
) -> tuple[Backbone, GuardStopError | NonFiniteLossError | None]:
    """Run both phases. Returns the encoder to keep, and the error when the guard or the loss stopped the run."""
    recipe, refiner, phases = job.recipe, job.refiner, job.phases()
    guard = make_guard(job, images, run, phases[-1].steps, monitor) if recipe.guard.enabled else None
    try:
        fit(phases, {"model": refiner, "ema": job.ema}, run, loop, reporter, monitor, guard)
    except (GuardStopError, NonFiniteLossError) as error:
        if guard is None:
            raise
        return guard.load_best(load_backbone(model)), error
    refined = job.ema.module if recipe.export_weights == "ema" else refiner.backbone
    assert isinstance(refined, Backbone)
    if is_sharded(refined):
        whole = full_state(refined)
        refined = load_backbone(model)
        refined.load_state_dict(whole)
    return refined, None


def make_guard(job: Refinement, images: ImageSet, run: RunFolder, steps: int, monitor: OnlineKnn | None) -> Guard:
    """The do-no-harm guard over the refinement's ``steps``, on global crops of the training images."""
    recipe, backbone = job.recipe, job.refiner.backbone
    probe = FeatureProbe(
        backbone,
        images,
        view_specs(recipe)[0],
        count=recipe.guard.images,
        pooling=recipe.heads.pooling,
        device=job.device,
        precision=job.precision,
    )
    knn_images = 0 if monitor is None else len(monitor.test_indices)
    return Guard(probe, backbone, run, recipe.guard, steps=steps, probe_images=probe.count, knn_images=knn_images)


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
    refiner = Refiner(backbone, blocks, config, pooling=heads.pooling, frozen_blocks=recipe.frozen_blocks)
    if recipe.micro_batch is not None:
        refuse_batch_dependent(refiner)
    return refiner


def online_knn(
    refiner: Refiner, bank: ImageSet, test: ImageSet | None, recipe: RefineRecipe, device: torch.device, precision: str
) -> OnlineKnn | None:
    """k-NN of the head blocks during training; None without labels or when the recipe turns it off."""
    if bank.labels is None or not recipe.knn_every:
        return None
    return OnlineKnn(
        refiner.backbone,
        bank,
        test,
        blocks=refiner.blocks,
        pooling=recipe.heads.pooling,
        device=device,
        precision=precision,
    )


def conclude(
    stages: dict[str, Backbone],
    bank: ImageSet,
    test: ImageSet | None,
    recipe: RefineRecipe,
    out: Path,
    data: str,
    device: torch.device,
    seed: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Compare before and after, and export the refined encoder with its figures, into the folder ``out``."""
    summary = compare(
        stages,
        thinned(bank, SUMMARY_TRAIN_LIMIT),
        None if test is None else thinned(test, SUMMARY_TEST_LIMIT),
        pooling=recipe.heads.pooling,
        head_blocks=[int(block) for block in recipe.heads.blocks],
        out=out,
        device=device,
        precision="fp32",
        seed=seed,
        reporter=reporter,
    )
    shown = bank if test is None else test
    pooling = recipe.heads.pooling
    write_gallery(stages, shown, out, pooling=pooling, device=device, seed=seed, reporter=reporter)
    card = {
        "base": Path(stages["before"].info.source).name,
        "data": data,
        "recipe": recipe.model_dump(mode="json"),
        "before": summary["before"],
        "after": summary["after"],
    }
    recommended = summary["recommendation"]
    facts = {key: recommended[key] for key in ("block", "pooling", "norm")} | {"recommendation": recommended["reason"]}
    export_timm(stages["after"].to("cpu"), out / "export", card=card, facts=facts)
    return summary


def resolve(recipe: RefineRecipe, backbone: Backbone) -> RefineRecipe:
    """Replace every "auto" by what the encoder gives; raises InputError for sizes that do not fit its patches."""
    info = backbone.info
    recipe = recipe.model_copy(deep=True)
    if recipe.heads.blocks in ("last_third", "auto"):  # "auto" has been measured before; a mere plan stays with this
        recipe.heads.blocks = list(range(info.depth - max(1, info.depth // 3), info.depth))
    wrong = [block for block in recipe.heads.blocks if not -info.depth <= int(block) < info.depth]
    if wrong:
        raise InputError(
            f"heads.blocks: block {wrong[0]} is out of range; the encoder has blocks 0 to {info.depth - 1}"
        )
    recipe.heads.blocks = sorted({int(block) % info.depth for block in recipe.heads.blocks})
    if recipe.freeze_below:
        still = negligible_blocks(info.depth, recipe.refinement.layer_decay, recipe.freeze_below)
        recipe.frozen_blocks = max(recipe.frozen_blocks, min(still, recipe.heads.blocks[0]))
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
