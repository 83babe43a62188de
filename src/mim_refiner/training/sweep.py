"""Sweep: heads of several temperatures and poolings learn side by side on the frozen encoder, and the best one stays.

The encoder passes once for all of them, and their queues fill as in the head warm-up. What counts is seen before a
batch is learnt from, in the first epoch that shows it, so it is held out: with labels, how often a head's nearest
neighbour is of the image's class; without, how often the two global views of an image have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mim_refiner.core.collectives import average_gradients, from_ranks, process_rows, use_rows
from mim_refiner.core.metrics import crossed_interval
from mim_refiner.core.optim import adamw, parameter_groups, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadOutput, Objective, RefinerHead, draw_choices
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import in_points
from mim_refiner.training.loop import learning_rate, step_generator
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import NUM_GLOBAL, make_views, objective_of, photometrics_of

STEPS = 8  # at least: the queues are random at first, so where an epoch has fewer there are several epochs
SWEEP = 2  # number of the phase that its draws belong to; 0 and 1 are the run's own


def sweep_heads(recipe: RefineRecipe, backbone: Backbone, loader: TrainLoader, run: Run) -> dict[str, Any]:
    """{"chosen": what of temperature and pooling is swept, "measure", "values": {choice: share}, "lead", "reason"}. The
    recipe must be resolved. On the last head block: one epoch of ``loader``, or as many as have ``STEPS`` steps; the
    share is over the images of the second half. ``lead``: how far the best one is ahead of the next ("over"), with a
    paired 95 % interval over these images; it is chosen in any case.
    """
    choices, block = choices_of(recipe), int(recipe.heads.blocks[-1])
    config, objective = objective_of(recipe)
    last = objective if isinstance(objective, Objective) else objective[-1]
    poolings: list[str] = [*recipe.sweep.poolings] or [recipe.heads.measured_pooling]
    refiner = Refiner(backbone, [block], config, last, pooling="+".join(poolings)).to(run.device)
    refiner.freeze_encoder()
    heads: list[RefinerHead] = []
    for choice in choices:
        torch.manual_seed(run.seed)  # the same start for each
        own = replace(last, temperature=choice.get("temperature", last.temperature))
        head = RefinerHead(backbone.block_dims[block], config, own, top_k=recipe.warmup.top_k)
        heads.append(head.to(run.device))
    reads = [poolings.index(choice.get("pooling", poolings[0])) for choice in choices]
    labels = loader.images.telling_labels
    known = None if labels is None else torch.as_tensor(labels, device=run.device)
    hits = _of_images(*_trained(recipe, refiner, heads, reads, loader, run, known))
    shares = hits.mean(1)
    best, second = shares.argsort(descending=True, stable=True)[:2][[0, -1]].tolist()
    lead = crossed_interval((hits[best] - hits[second])[None])
    names = [", ".join(f"{name} {value}" for name, value in choice.items()) for choice in choices]
    values = dict(zip(names, shares.tolist(), strict=True))
    what = "two views have the same nearest neighbour" if labels is None else "nearest neighbours of the same class"
    others = "; ".join(f"{name}: {100 * share:.1f} %" for name, share in values.items() if name != names[best])
    return {
        "chosen": choices[best],
        "measure": "view agreement" if labels is None else "neighbour accuracy",
        "values": values,
        "lead": {"over": names[second], "value": lead[0], "ci95": lead[1:]},
        "reason": f"{names[best]}: {what} in {100 * float(shares[best]):.1f} % ({others}); "
        f"{'' if lead[1] > 0 else 'not '}clearly better than {names[second]}: {in_points(*lead)}",
    }


def choices_of(recipe: RefineRecipe) -> list[dict[str, Any]]:
    """What a head is tried with: every temperature with every pooling of ``recipe.sweep``."""
    both: dict[str, list[Any]] = {"temperature": [*recipe.sweep.temperatures], "pooling": [*recipe.sweep.poolings]}
    swept = {name: values for name, values in both.items() if values}
    return [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]


def _trained(
    recipe: RefineRecipe,
    refiner: Refiner,
    heads: Sequence[RefinerHead],
    reads: Sequence[int],  # which of the poolings, one behind the other in the features, each head reads
    loader: TrainLoader,
    run: Run,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Train the heads; return the numbers of the images in the second half of the steps [R], and how often each head is
    right on them [H, R], both on the host.
    """
    learnt = nn.ModuleList(heads)
    groups = parameter_groups(learnt.named_parameters(), weight_decay=recipe.head_weight_decay)
    optimizer = adamw(groups, recipe.betas)
    photometrics, epochs = photometrics_of(recipe, refiner.backbone.info), -(-STEPS // loader.steps_per_epoch)
    steps = epochs * loader.steps_per_epoch
    rise = min(recipe.warmup.warmup_epochs, 0.2 * epochs)
    phase = recipe.warmup.model_copy(update={"epochs": epochs, "warmup_epochs": rise})
    run.reporter.phase("sweep of heads", steps)
    seen: list[tuple[Tensor, Tensor]] = []
    with closing(batch for epoch in range(epochs) for batch in loader.epoch(epoch)) as batches:
        for step, batch in enumerate(batches):
            generator, rows = step_generator(run.seed, SWEEP, step), process_rows(len(batch.sample_ids))
            views, ids = make_views(batch, photometrics, generator, run)
            with use_rows(rows), run.autocast():
                [features] = refiner.features(views).values()
                drawn = draw_choices(heads[:1], NUM_GLOBAL, len(ids), generator, run.device)  # alike for all
                parts = features.chunk(max(reads) + 1, dim=-1)
                choice = drawn and drawn[0]
                outputs = [head(parts[read], ids, choice=choice) for head, read in zip(heads, reads, strict=True)]
            optimizer.zero_grad(set_to_none=True)
            torch.stack([output.loss for output in outputs]).sum().backward()
            average_gradients(learnt.parameters())
            set_learning_rate(optimizer, learning_rate(phase, recipe.batch_size, loader.steps_per_epoch, step))
            optimizer.step()
            if step >= steps // 2:
                seen.append((batch.sample_ids, _hits(outputs, ids, labels)))
            run.reporter.progress(step + 1, {})
    shown, hits = (torch.cat(parts, dim=-1).cpu() for parts in zip(*seen, strict=True))
    ranks = zip(*from_ranks((shown, hits)), strict=True)
    shown, hits = (torch.cat(parts, dim=-1) for parts in ranks)
    return shown, hits.double()


def _hits(outputs: Sequence[HeadOutput], ids: Tensor, labels: Tensor | None) -> Tensor:
    """Share of an image's views whose neighbour is of its class [H, B]; without labels, 1 where all have the same."""
    found = torch.stack([output.neighbor_sample_ids.view(-1, len(ids)) for output in outputs])  # [H, views, B]
    right = found == found[:, :1] if labels is None else labels[found.clamp(min=0)] == labels[ids]
    right &= found >= 0  # not an entry of the random start
    return right.all(1).float() if labels is None else right.float().mean(1)


def _of_images(ids: Tensor, hits: Tensor) -> Tensor:
    """Mean of ``hits`` [H, R] over the times that each image is in ``ids`` [R], [H, N]: an image counts once."""
    images, place = ids.unique(return_inverse=True)
    return hits.new_zeros(len(hits), len(images)).index_add_(1, place, hits) / place.bincount()
