"""``refine``: both phases of MIM-Refiner in one run folder, then before and after."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mim_refiner.checkpoints.families.base import GUESS
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands import inputs
from mim_refiner.commands.comparison import SUMMARY_TEST_LIMIT, Measured, advised, compare, measure_on
from mim_refiner.commands.deadline import REPORT, Box
from mim_refiner.commands.loggers import logged
from mim_refiner.commands.measured_settings import head_block_settings, refuse_other_run, settle
from mim_refiner.commands.monitor import OnlineKnn
from mim_refiner.commands.plan import plan as run_plan
from mim_refiner.commands.plan import with_cost
from mim_refiner.commands.report import finish_with_report, write_gallery
from mim_refiner.commands.survey import thinned
from mim_refiner.core.device import resolve_precision
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.launch import together
from mim_refiner.core.run import Run
from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.core.sharding import full_state, is_sharded, load_full_state
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.errors import GuardStopError, NonFiniteLossError
from mim_refiner.export.adapter import write_adapter
from mim_refiner.export.timm import export_timm, timm_config
from mim_refiner.files import name_of, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.lora import adapted, lora_share, merge_lora
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import Reporter, listener, number_of, remarks
from mim_refiner.settings import read_setting, setting_texts
from mim_refiner.training.estimate import Estimate
from mim_refiner.training.guard import load_best
from mim_refiner.training.loop import stops_cleanly
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.refine import Refinement, adapt, build, make_refiner, train, view_specs
from mim_refiner.training.resolve import START_SHARE, choose_weights, resolve, start_share
from mim_refiner.training.state import RunFolder
from mim_refiner.training.view_pool import refuse_pool


@logged
def refine(
    *,
    data: Any,
    model: Any,
    out: str,
    recipe: str | None = None,
    eval_data: Any = None,
    eval_test: Any = None,
    head_blocks: str | None = None,
    settings: str | Sequence[str] | Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    memory_budget: str | None = None,
    plan: bool = False,
    exclude: str | None = None,
    log: str | Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Refine the encoder ``model`` on the images ``data`` (labels optional) and compare it with what it was.

    ``data``: a path or what :func:`mim_refiner.data.sources.open_source` takes; ``model``: a source of load_backbone.
    Head warm-up on the frozen encoder, then refinement (paper section 3.3). ``eval_data``/``eval_test``: labelled
    images to measure on; without them a part of ``data``, if it has labels, is held out for that (``hold_out`` of the
    recipe). The same call on the same folder resumes. ``head_blocks``: "auto" places the heads by measurement
    (``analysis.atlas``), "last_third" or block numbers such as "8,9" overrule the recipe. ``memory_budget``
    ("24GB", "auto") picks micro_batch, kept_graphs and checkpointing so that a step fits; ``plan`` only returns what
    the run would need and cost. ``exclude``: list of images to leave out (as doctor writes it). ``log``: further
    loggers (tensorboard, wandb, mlflow). Returns the summary {"before", "after", "verdict", "recommendation",
    "seconds"}, also in summary.json; export/ is a timm folder. Raises MimRefinerError with one line on bad input,
    GuardStopError when the guard stopped the run (export/ then holds the best state).
    """
    given = dict(locals())
    del given["head_blocks"], given["log"]
    given |= {"settings": [*setting_texts(settings), *head_block_settings(head_blocks)], "reporter": listener(reporter)}
    own = refine_recipe(recipe, given["settings"], image_size=0).normalization == "data"
    with remarks(unless=f"{GUESS}mean" if own else ""):  # mean and std are then known
        return refine_and_compare(**given)


@stops_cleanly()
@together()
def refine_and_compare(
    *,
    data: Any,
    model: Any,
    out: str,
    recipe: str | None,
    eval_data: Any,
    eval_test: Any,
    settings: list[str],
    device: str,
    seed: int,
    overwrite: bool,
    reporter: Reporter,
    memory_budget: str | None = None,
    plan: bool = False,
    exclude: str | None = None,
    others: Mapping[str, str] | None = None,
    box: Box | None = None,
) -> dict[str, Any]:
    """As :func:`refine`; ``others``: encoders {stage: source} to measure beside it, in the time that ``box`` leaves."""
    started, run = time.perf_counter(), inputs.join_training(None if plan else out, device, seed, reporter)
    torch.manual_seed(seed)  # of tensors that the checkpoint lacks: they are part of what the run is known by
    backbone = load_backbone(model)
    timm_config(backbone)  # what cannot be exported is not trained
    weights = weights_sha256(backbone.model)
    first = refine_recipe(recipe, settings, image_size=0)
    images, held_out = inputs.training_images(data, first, settings, eval_data, run, backbone.info.in_chans, exclude)
    inputs.refuse_to_overwrite_inputs(out, overwrite, data=data, model=model, eval_data=eval_data, eval_test=eval_test)
    read = partial(refine_recipe, recipe, image_size=max(backbone.info.image_size), images=len(images))
    chosen, base = read(settings), read([each for each in settings if read_setting(each)[0] != "heads.blocks"])
    run = replace(run, precision=resolve_precision(chosen.precision, run.device))
    on = measure_on(images, held_out, eval_data, eval_test, run)
    inputs.refuse_other_work(chosen, run, weights, images=images, eval_data=on.bank, eval_test=on.test)
    asked = {"command": "refine", "data": name_of(data), "model": name_of(model), "model_sha256": weights, "seed": seed,
             "exclude": exclude}  # fmt: skip
    before = None if overwrite or plan else Path(out)  # of an earlier start
    refuse_other_run(before, asked, resolve(chosen, backbone), images)
    chosen, found = settle(chosen, base, backbone, (images, on.bank), run, before, plan)
    refiner = prepare(backbone, chosen, run)
    loader = inputs.train_loader(images, view_specs(chosen), chosen, run)
    chosen = choose_weights(chosen, loader.steps_per_epoch)
    refuse_pool(chosen, refiner, loader.steps_per_epoch * chosen.batch_size, run)
    measuring = on.facts() | {"weights": chosen.export_weights, "others": dict(others or {})}
    ended = inputs.ended_run(before, measuring, ("export/config.json", "evaluation/gallery.json"))
    chosen, cost = (chosen, None) if ended else with_cost(chosen, refiner, loader, memory_budget, run, on)
    if plan and cost:
        return run_plan(chosen, refiner, cost, run, loader.cut_where)
    folder = inputs.open_run(out, inputs.known_by(asked, chosen, images), reporter, overwrite, started)
    if ended is not None:
        reporter.message(inputs.ENDED)
        return ended if folder.writes else {}
    for name, record in found.items() if folder.writes else ():
        write_json(folder.path / f"{name}.json", record)
    skipped = inputs.list_skipped(images, folder, reporter)
    announce(chosen, backbone, loader, run, cost)
    refinement = build(chosen, refiner, loader, run)
    monitor = online_knn(refinement, on)
    with contextlib.closing(loader):
        after, taken, stopped = trained(refinement, folder, monitor, model)
    inputs.list_skipped(images, folder, reporter, skipped)
    training, told = folder.seconds, monitor.forecast(folder.path) if monitor else {}
    stages = {"before": load_backbone(model), **after}
    for stage in stages.values():
        stage.info = replace(stage.info, mean=backbone.info.mean, std=backbone.info.std)
    stages |= {stage: load_backbone(source) for stage, source in (others or {}).items()}
    card = {"data": f"{Path(name_of(data)).name} ({number_of(len(images), 'images')})", "weights": taken["reason"]}
    # ranks that measure along with the first one write what nobody keeps
    with contextlib.nullcontext(folder.path) if folder.writes else tempfile.TemporaryDirectory() as results:
        summary = conclude(stages, on, chosen, Path(results), card, replace(run, precision="fp32"), box)
    if not folder.writes:
        return {}  # the rest is rank 0's
    summary["verdict"] = advised(summary, chosen, folder.path, backbone, model, stopped)
    summary |= {"data": {"train": images.facts()}, "weights": taken, **found, **told,
                "seconds": {"training": training, "total": folder.seconds}}  # fmt: skip
    summary |= {"stopped": str(stopped)} if stopped else {}
    inputs.write_summary(folder.path, summary, measuring)
    finish_with_report(folder.path, reporter)
    if stopped:
        raise stopped
    return summary


def prepare(backbone: Backbone, recipe: RefineRecipe, run: Run) -> Refiner:
    """The encoder with fresh heads, on its device and as fast as it goes there."""
    inputs.run_fast(backbone, recipe, run)
    torch.manual_seed(run.seed)
    return make_refiner(backbone, recipe).to(run.device)


def online_knn(refinement: Refinement, on: Measured) -> OnlineKnn | None:
    """k-NN of the head blocks during training, where it is asked for; of which images is said."""
    recipe, refiner = refinement.recipe, refinement.refiner
    draws = recipe.refinement.epochs * refinement.loader.steps_per_epoch * recipe.batch_size
    how: dict[str, Any] = {"blocks": refiner.blocks, "pooling": recipe.heads.measured_pooling, "draws": draws}
    monitor = OnlineKnn.watching(recipe, refiner.backbone, on.bank, run=refinement.run, refiner=refiner, **how)
    if monitor:
        own = "another part of these" if on.test is None else "the test images"
        some = f"{monitor.size} of the {number_of(len(on.bank), 'images')} to compare with"
        refinement.run.reporter.message(f"k-NN accuracy while training is of {some}; the summary's is of {own}")
    return monitor


def trained(
    refinement: Refinement, folder: RunFolder, monitor: OnlineKnn | None, model: Any
) -> tuple[dict[str, Backbone], dict[str, Any], GuardStopError | NonFiniteLossError | None]:
    """Train. Returns the encoder to keep as "after", which weights those are and why, and the error when the guard or
    the loss stopped the run.

    After a run long enough for an average the weights that are not kept stand beside it, as "raw" or "average".
    """
    try:
        train(refinement, folder, monitor)
    except (GuardStopError, NonFiniteLossError) as error:
        if not refinement.recipe.guard.enabled:
            raise
        best = load_backbone(model)
        adapt(best, refinement.recipe)
        taken = {"exported": "best", "reason": "best: the state that the guard found best, as the run was stopped"}
        return unadapted({"after": load_best(folder, best)}, folder, model), taken, error
    average = refinement.ema.module
    assert isinstance(average, Backbone)
    weights, taken = {"raw": refinement.refiner.backbone, "average": average}, weights_taken(refinement)
    stages = {"after": weights.pop(taken["exported"])} | (weights if taken["both_measured"] else {})
    for stage, encoder in stages.items():
        if is_sharded(encoder):
            whole, stages[stage] = full_state(encoder), load_backbone(model)
            load_full_state(stages[stage], whole)
    return unadapted(stages, folder, model), taken, None


def unadapted(stages: dict[str, Backbone], folder: RunFolder, model: str) -> dict[str, Backbone]:
    """The encoders with their adapters merged; those of "after" are in adapter/ too. As they are without adapters."""
    if adapted(stages["after"]):
        if folder.writes:
            write_adapter(stages["after"], folder.path / "adapter", model)
        for encoder in stages.values():
            merge_lora(encoder)
    return stages


def weights_taken(refinement: Refinement) -> dict[str, Any]:
    """Which weights are exported and why, {"exported": "raw" or "average", ...}, for the summary."""
    share = start_share(refinement.recipe, refinement.loader.steps_per_epoch)
    choice = refinement.recipe.export_weights
    exported = "average" if choice == "ema" else "raw"
    reason = f"{exported} (export_weights={choice}); {100 * share:.1f} % of an average is the start"
    return {"exported": exported, "both_measured": share <= START_SHARE, "start_share": share, "reason": reason}


def conclude(
    stages: dict[str, Backbone],
    on: Measured,
    recipe: RefineRecipe,
    out: Path,
    card: dict[str, Any],
    run: Run,
    box: Box | None = None,
) -> dict[str, Any]:
    """Compare before and after, and export the refined encoder with its figures, into the folder ``out``.

    ``card``: what its model card says beside them. It is exported, without figures, where the comparison fails too.
    """
    if on.test is not None and box is None:
        on = replace(on, test=thinned(on.test, SUMMARY_TEST_LIMIT))
    settings, facts = recipe.model_dump(mode="json", exclude={"expected"}), dict[str, Any]()
    card |= {"base": Path(stages["before"].info.source).name, "recipe": settings}
    try:
        summary = compare(stages, on, recipe, out, run, box)
        card |= {"before": summary["before"], "after": summary["after"]}
        found = summary["recommendation"]
        facts = {key: found[key] for key in ("block", "pooling", "norm")} | {"recommendation": found["reason"]}
        pictured = {stage: encoder for stage, encoder in stages.items() if stage not in ("raw", "average")}
        if box is None or box.left(REPORT / 2) > 0:
            write_gallery(pictured, on.tested, out, pooling=recipe.heads.measured_pooling, run=run)
    finally:
        export_timm(stages["after"].to("cpu"), out / "export", card=card, facts=facts)
    return summary


def announce(recipe: RefineRecipe, backbone: Backbone, loader: TrainLoader, run: Run, cost: Estimate | None) -> None:
    """Say what is about to run: sizes, base and peak learning rate of both phases, and what it costs."""
    info, heads, images = backbone.info, recipe.heads, len(loader.images)
    blocks: Sequence[Any] = heads.blocks
    pooling = heads.pooling if isinstance(heads.pooling, str) else ", ".join(heads.pooling)
    run.reporter.message(
        f"recipe {recipe.name}: {info.architecture} ({info.family}), {number_of(len(blocks), 'heads')} on blocks "
        f"{blocks[0]} to {blocks[-1]} ({pooling}), {number_of(images, 'images')}, batch {recipe.batch_size}, "
        f"{number_of(loader.steps_per_epoch, 'steps an epoch')}, {run.precision}"
    )
    if adapted(backbone):
        run.reporter.message(
            f"adapter: LoRA of rank {recipe.lora.rank}; it trains, {lora_share(backbone):.1%} of the encoder's size"
        )
    for name, phase in (("warm-up", recipe.warmup), ("refinement", recipe.refinement)):
        rates = f"base {phase.base_lr:.3g}, peak {peak_learning_rate(phase.base_lr, recipe.batch_size):.3g}"
        run.reporter.message(f"{name}: {number_of(phase.epochs, 'epochs')}, learning rate {rates}")
    if cost is not None:
        run.reporter.message(cost.line)
