"""A refinement from top to bottom: build it from a resolved recipe, warm up the heads on the frozen encoder, refine.

Below it lie data/photometric.py (colours and blur), models/refiner.py and models/heads.py (encoder and heads, their
loss in core/nna.py), and training/cached.py (the step of a batch that does not fit). What surrounds the steps and is
the same for pre-training (resume, log, save, stop) is training/loop.py. CONTRIBUTING.md has the map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from mim_refiner.core.collectives import average_gradients, end_together, is_distributed, process_rows, use_rows
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.guidance import Guide, known_labels
from mim_refiner.core.layer_decay import layer_decay_scales
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.optim import adamw, parameter_groups, set_learning_rate
from mim_refiner.core.run import Run, send
from mim_refiner.core.threads import paced
from mim_refiner.data.domain import DomainSpec
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.data.photometric import BatchPhotometric, augment
from mim_refiner.data.views import ViewSpec, multi_crop_views
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadConfig, Objective
from mim_refiner.models.lora import add_lora
from mim_refiner.models.refiner import DenseAnchor, Refiner, RefinerOutput
from mim_refiner.reporting import number_of
from mim_refiner.training.cached import cached_forward_backward, refuse_batch_dependent
from mim_refiner.training.graphed import Graphed, uses_graph
from mim_refiner.training.guard import FeatureProbe, Guard
from mim_refiner.training.loop import Loop, Monitor, step_generator
from mim_refiner.training.metric_log import metrics_of
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.resolve import check_guidance, head_blocks
from mim_refiner.training.state import RunFolder
from mim_refiner.training.view_pool import ViewPool, make_pool
from mim_refiner.types import BackboneInfo

WARMUP, REFINEMENT = 0, 1  # numbers of the phases
NUM_GLOBAL = 2
POOL_SHARE = 0.6  # of a phase's limited time that a view pool may take
SAME = (  # settings of views that go to them as they are
    "flip", "vflip", "crop_axes", "jitter_prob", "gray_prob", "blur_prob", "blur_sigma", "solarize_prob"
)  # fmt: skip


# --- build


def make_refiner(backbone: Backbone, recipe: RefineRecipe) -> Refiner:
    """The encoder with its heads; raises InputError for a batch that the queues cannot hold."""
    heads, top_k = recipe.heads, max(recipe.warmup.top_k, recipe.refinement.top_k)
    for name, size, setting in (("batch_size", recipe.batch_size, ""), ("top_k", top_k, "refinement.")):
        if size > heads.queue_size:
            raise InputError(
                f"{name} {size} is larger than the queue of {heads.queue_size}; "
                f"set a smaller {setting}{name} or a larger heads.queue_size"
            )
    adapt(backbone, recipe)
    config, objective = objective_of(recipe)
    blocks = head_blocks(recipe, backbone.info.depth)
    refiner = Refiner(backbone, blocks, config, objective, pooling=heads.pooling, frozen_blocks=recipe.frozen_blocks)
    if recipe.anchor.weight:
        refiner.anchor = DenseAnchor(backbone, {"last": [-1], "heads": refiner.blocks}[recipe.anchor.blocks])
    refuse_batch_dependent(backbone, recipe.micro_batch, recipe.checkpointing)
    return refiner


def adapt(backbone: Backbone, recipe: RefineRecipe) -> None:
    """Add the recipe's adapters, if any; raises InputError where they cannot be."""
    if recipe.adapter == "none":
        return
    if recipe.shard or recipe.compile:
        raise InputError("adapter=lora goes neither with shard nor with compile; set shard=false and compile=false")
    add_lora(backbone, recipe.lora.targets, recipe.lora.rank, recipe.lora.alpha, recipe.frozen_blocks)


def objective_of(recipe: RefineRecipe) -> tuple[HeadConfig, Objective | list[Objective]]:
    """Sizes of a head, and its loss: one for all heads, or one for each."""
    h = recipe.heads
    config = HeadConfig(h.projector_hidden, h.predictor_hidden, h.out_dim, h.queue_size)
    same = h.view_pairing, NUM_GLOBAL, h.swap_negatives, h.swap_positive
    if isinstance(h.temperature, list):
        return config, [Objective(temperature, *same) for temperature in h.temperature]
    return config, Objective(h.temperature, *same)


def view_specs(recipe: RefineRecipe) -> list[ViewSpec]:
    """The recipe's views, global ones first."""
    views = recipe.views
    assert views.global_size is not None
    assert views.local_size is not None
    sizes = views.global_size, views.local_size, views.num_local, views.global_scale, views.local_scale
    same: dict[str, Any] = {name: getattr(views, name) for name in SAME}
    for name, strength in zip(("brightness", "contrast", "saturation", "hue"), views.jitter, strict=True):
        same[name] = strength * views.jitter_strength
    domain = DomainSpec(views.rotate, views.gain, views.noise, views.mask_rows, views.mask_columns)
    return multi_crop_views(*sizes, **same, domain=domain)


def photometrics_of(recipe: RefineRecipe, info: BackboneInfo) -> list[BatchPhotometric]:
    """What colours the views, one a view."""
    return [BatchPhotometric(view, info.mean, info.std) for view in view_specs(recipe) for _ in range(view.count)]


@dataclass(frozen=True)
class Refinement:
    """What a refinement is made of."""

    recipe: RefineRecipe  # resolved
    refiner: Refiner  # encoder and heads
    ema: ExponentialMovingAverage  # of the encoder
    loader: TrainLoader  # uint8 crops
    photometrics: Sequence[BatchPhotometric]  # one a view
    run: Run
    labels: Tensor | None = None  # [images]; to measure with, and to train with by ``recipe.guidance`` alone


def build(recipe: RefineRecipe, refiner: Refiner, loader: TrainLoader, run: Run) -> Refinement:
    """Average, photometrics and labels beside the refiner. Spreads the encoder over the processes, and lets the heads
    look up with labels, if asked. Raises DataError and InputError as ``check_guidance``.
    """
    check_guidance(recipe, loader.images)
    backbone = refiner.backbone
    ema = ExponentialMovingAverage(backbone)
    if recipe.shard and is_distributed():
        start = [] if refiner.anchor is None else [refiner.anchor.start]
        for encoder in (backbone, ema.module, *start):
            encoder.shard_blocks(bf16=run.precision == "bf16")  # type: ignore[operator]
    backbone.set_checkpointing(recipe.checkpointing)
    if recipe.guidance != "none" and loader.images.labels is not None:
        known = known_labels(loader.images.labels, recipe.guidance_share, run.seed).to(run.device)
        for block in refiner.blocks:
            refiner.head(block).queue.guide = Guide(known, restrict=recipe.guidance == "restrict")
    photometrics, labels = photometrics_of(recipe, backbone.info), loader.images.telling_labels
    on_device = None if labels is None else torch.as_tensor(labels, device=run.device)
    return Refinement(recipe, refiner, ema, loader, photometrics, run, on_device)


# --- train


def train(refinement: Refinement, folder: RunFolder, monitor: Monitor | None = None) -> None:
    """Both phases, from wherever the run in ``folder`` stands. ``monitor`` measures the encoder at ends of epochs.

    Raises NonFiniteLossError (see Loop.attempt); GuardStopError; DataError, and KeyboardInterrupt after a stop signal,
    with a checkpoint written.
    """
    recipe, loader, run = refinement.recipe, refinement.loader, refinement.run
    modules = {"model": refinement.refiner, "ema": refinement.ema}
    guard = make_guard(refinement, folder, monitor) if recipe.guard.enabled else None
    pool = make_pool(recipe, loader, run.seed)
    loop = Loop(folder, run, recipe, loader, modules, monitor, guard)
    while not loop.finished:
        with loop.attempt():
            for number in range(loop.position.phase, REFINEMENT + 1):
                if monitor and number == REFINEMENT and not loop.position.step:
                    monitor.warmed_up(folder.path)
                train_phase(refinement, loop, number, pool)


def train_phase(refinement: Refinement, loop: Loop, number: int, pool: ViewPool | None = None) -> None:
    """Head warm-up (number 0) or refinement (1), step by step; on frozen features where a pool has them."""
    recipe, refiner, run, labels = refinement.recipe, refinement.refiner, refinement.run, refinement.labels
    if number == WARMUP:
        name, phase, optimizer = "warmup", recipe.warmup, begin_warmup(refinement)
    else:
        name, phase, optimizer = "refinement", recipe.refinement, begin_refinement(refinement)
    pool, spent = filled(pool, refinement, loop, phase.max_seconds)
    loop.begin(number, name, phase, optimizer, moves_encoder=number == REFINEMENT, spent=spent)
    graph = graphed(refiner, run, labels) if uses_graph(recipe, refiner, run) else None
    parts = recipe.micro_batch, recipe.graphs
    with closing(loop.batches(pool)) as batches:
        for step, batch in batches:
            generator = step_generator(run.seed, number, step)  # of all the step's draws
            optimizer.zero_grad(set_to_none=True)
            views, sample_ids = make_views(batch, refinement.photometrics, generator, run)
            if graph:
                loss, metrics = graph(views, sample_ids, refiner.draw_choices(sample_ids, generator))
            else:
                output = forward_backward(refiner, views, sample_ids, generator, run, *parts)
                loss, metrics = output.loss, metrics_of(output, sample_ids, labels)
            if number == REFINEMENT and refiner.anchor and carries_anchor(step, recipe.anchor.share):
                distance = anchor_backward(refiner, views[:NUM_GLOBAL], generator, run, recipe.anchor.weight, parts[0])
                metrics |= {"loss": loss.detach(), "anchor": distance}  # the logged loss is that of the heads
                loss = loss + distance
            average_gradients(refiner.parameters())
            loop.log.add(step, loss, metrics, len(sample_ids))
            with loop.update(step) as learning_rate:
                set_learning_rate(optimizer, learning_rate)
                optimizer.step()
                if number == REFINEMENT:
                    refinement.ema.update(refiner.backbone, recipe.ema_decay)


def begin_warmup(refinement: Refinement) -> torch.optim.Optimizer:
    """The heads alone learn, on a frozen encoder."""
    recipe, refiner = refinement.recipe, refinement.refiner
    refiner.freeze_encoder()
    refiner.set_top_k(recipe.warmup.top_k)
    heads = parameter_groups(refiner.heads.named_parameters(), weight_decay=recipe.head_weight_decay)
    return adamw(heads, recipe.betas)


def begin_refinement(refinement: Refinement) -> torch.optim.Optimizer:
    """Everything learns, the encoder with layer decay; heads and queues go on as the warm-up left them."""
    recipe, refiner = refinement.recipe, refinement.refiner
    refiner.unfreeze_encoder()
    refiner.set_top_k(recipe.refinement.top_k)
    model, decay = refiner.backbone.model, recipe.refinement.layer_decay
    scales = layer_decay_scales(model, decay) if decay < 1 else None
    encoder = parameter_groups(model.named_parameters(), weight_decay=recipe.weight_decay, scales=scales)
    heads = parameter_groups(refiner.heads.named_parameters(), weight_decay=recipe.head_weight_decay)
    return adamw(encoder + heads, recipe.betas)


# --- a step


def make_views(
    batch: ViewBatch, photometrics: Sequence[BatchPhotometric], generator: torch.Generator, run: Run
) -> tuple[list[Tensor], Tensor]:
    """The batch on the device: views [B, C, h, w] in new colours, normalised, and sample numbers [B].

    Photometrics are drawn for the images of all processes, of which these are some rows. Features of a pool stay as
    they are; what a step draws after them is what it draws without a pool.
    """
    rows = process_rows(len(batch.sample_ids))
    if batch.views[0].is_floating_point():
        for photometric in photometrics:
            photometric.draw(rows.total, generator)
        return batch.views, batch.sample_ids.to(run.device, non_blocking=True)
    views = augment(batch.views, photometrics, generator, run.device, rows)
    return views, send([batch.sample_ids], run.device)[0]


def forward_backward(
    refiner: Refiner,
    views: Sequence[Tensor],
    sample_ids: Tensor,
    generator: torch.Generator | None,
    run: Run,
    micro_batch: int | None = None,
    kept_graphs: int = 0,
    choices: Mapping[int, Tensor] | None = None,
) -> RefinerOutput:
    """Leave the gradients of this process's views in the parameters and return the losses of all heads.

    views: [B, C, h, w] each, normalised, global ones first; sample_ids [B]. micro_batch: images that pass through the
    encoder with a graph at a time; None, or at least B: all of them, the plain step. kept_graphs: of so many parts of
    the batch the graph is kept rather than made again. ``choices`` replays the plain step's draws among the nearest
    neighbours.
    """
    rows = process_rows(len(sample_ids))
    with use_rows(rows):
        if micro_batch is not None and micro_batch < rows.count:
            return cached_forward_backward(refiner, views, sample_ids, generator, run, rows, micro_batch, kept_graphs)
        with run.autocast():
            features = refiner.features(views)  # {block: [V, B, D]}
            output = refiner.head_losses(features, sample_ids, generator=generator, choices=choices)
        output.loss.backward()
        return output


def carries_anchor(step: int, share: float) -> bool:
    """Whether this step does: a ``share`` of all steps, evenly spread."""
    return math.floor((step + 1) * share) > math.floor(step * share)


def anchor_backward(
    refiner: Refiner,
    views: Sequence[Tensor],
    generator: torch.Generator,
    run: Run,
    weight: float,
    micro_batch: int | None = None,
) -> Tensor:
    """Add the gradients of ``weight`` times the distance on the global ``views`` to the parameters; return that.

    The encoder passes once more over these views, ``micro_batch`` images at a time: images do not meet in this loss,
    so the sum over parts is the whole. Random layers draw the same for any size of parts.
    """
    assert refiner.anchor is not None
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    rows = process_rows(len(views[0]))
    part = min(micro_batch or rows.count, rows.count)
    total = torch.zeros((), device=run.device)
    for start in range(0, rows.count, part):
        stop = min(start + part, rows.count)
        torch.manual_seed(seed)
        with use_rows(rows.part(start, stop)), run.autocast():
            prefix = refiner.frozen_prefix(torch.cat([view[start:stop] for view in views]))
            distance = refiner.anchor(refiner.backbone, prefix, refiner.frozen_blocks)
            loss = distance * (weight * (stop - start) / rows.count)
        loss.backward()
        total += loss.detach()
    return total


def graphed(refiner: Refiner, run: Run, labels: Tensor | None = None) -> Graphed:
    """Gradients, loss and metrics of a plain step as a CUDA graph of views, sample numbers and choices."""

    def work(
        views: list[Tensor], sample_ids: Tensor, choices: Mapping[int, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = forward_backward(refiner, views, sample_ids, None, run, choices=choices)
        return output.loss.detach(), metrics_of(output, sample_ids, labels)

    return Graphed(work, refiner)


# --- around the steps: the view pool, the guard


def filled(
    pool: ViewPool | None, refinement: Refinement, loop: Loop, limit: float | None
) -> tuple[ViewPool | None, float]:
    """The pool, with the frozen features of the views that the first epochs show, or None where this phase has none;
    and the seconds that it took, POOL_SHARE of the phase's ``limit`` at most. As in the warm-up, random layers rest.
    """
    run, recipe, refiner = refinement.run, refinement.recipe, refinement.refiner
    if pool and not refiner.encoder_frozen and not recipe.frozen_blocks:
        pool.release()  # it was the warm-up's
        return None, 0.0
    if pool is None or pool.full:
        return pool, 0.0
    began, wanted, warmup = monotonic(), pool.steps, recipe.warmup.epochs * pool.steps_per_epoch
    run.reporter.phase("view pool", wanted)
    with closing(loop.stream(0, wanted)) as batches:
        for number, batch in enumerate(paced(batches, limit, run.device)):
            place = (WARMUP, number) if number < warmup else (REFINEMENT, number - warmup)
            pool.add(*frozen_views(refinement, batch, step_generator(run.seed, *place)))
            end_together(bool(loop.signals))
            run.reporter.progress(number + 1, {})
            if limit is not None and monotonic() - began > POOL_SHARE * limit and not pool.full:
                pool.end()  # the loop with it
                run.reporter.message(f"view pool: {pool.steps} of {number_of(wanted, 'batches')}, to end in time")
                break
    return pool, monotonic() - began


def frozen_views(refinement: Refinement, batch: ViewBatch, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """What the frozen part makes of each of the batch's views [B, ...], and sample numbers [B] on the host."""
    recipe, refiner = refinement.recipe, refinement.refiner
    views, _ = make_views(batch, refinement.photometrics, generator, refinement.run)
    parts = zip(*(view.split(recipe.micro_batch or recipe.batch_size) for view in views), strict=True)
    with evaluation_mode(refiner.backbone), refinement.run.autocast():
        features = zip(*(refiner.frozen_features(images) for images in parts), strict=True)
        return [torch.cat(of_view) for of_view in features], batch.sample_ids


def make_guard(refinement: Refinement, folder: RunFolder, monitor: Monitor | None) -> Guard:
    """The do-no-harm guard over the refinement's steps, on global crops of the training images."""
    recipe, backbone, loader = refinement.recipe, refinement.refiner.backbone, refinement.loader
    looks = view_specs(recipe)[0], recipe.guard.images, recipe.heads.measured_pooling, refinement.run
    probe = FeatureProbe(backbone, loader.images, *looks)
    steps, knn = recipe.refinement.epochs * loader.steps_per_epoch, 0 if monitor is None else monitor.size
    return Guard(probe, backbone, folder, recipe.guard, steps=steps, probe_images=probe.count, knn_images=knn)
