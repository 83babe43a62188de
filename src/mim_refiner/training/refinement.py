"""The two phases of MIM-Refiner as the loop runs them: head warm-up on a frozen encoder, then refinement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from mim_refiner.core.device import autocast
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.layer_decay import layer_decay_scales
from mim_refiner.core.rows import process_rows
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.models.heads import HeadOutput
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.optim import adamw, parameter_groups, phase_schedule
from mim_refiner.training.recipe import Phase, RefineRecipe
from mim_refiner.training.step import forward_backward
from mim_refiner.training.trainer import StepOutput, TrainingPhase

NUM_GLOBAL = 2


class Refinement:
    """Builds warm-up and refinement for ``fit``; both share heads, queues and the data loader's views."""

    def __init__(
        self,
        refiner: Refiner,
        ema: ExponentialMovingAverage,
        recipe: RefineRecipe,
        loader: TrainLoader,
        photometrics: Sequence[BatchPhotometric],
        *,
        device: torch.device,
        precision: str,
        labels: np.ndarray | None = None,
    ) -> None:
        self.refiner, self.ema, self.recipe, self.loader = refiner, ema, recipe, loader
        self.photometrics, self.device, self.precision = photometrics, device, precision
        self.labels = None if labels is None else torch.as_tensor(labels, device=device)
        if recipe.checkpointing:
            refiner.backbone.model.set_grad_checkpointing(True)

    def phases(self) -> list[TrainingPhase]:
        return [
            self._phase("warmup", self.recipe.warmup, self.begin_warmup, moves_encoder=False),
            self._phase("refinement", self.recipe.refinement, self.begin_refinement, after_step=self.update_ema),
        ]

    def _phase(self, name: str, settings: Phase, begin: Callable[[], Optimizer], **options: Any) -> TrainingPhase:
        schedule = phase_schedule(settings, self.recipe.batch_size, self.loader.steps_per_epoch)
        return TrainingPhase(name, settings.epochs, self.loader, schedule, begin, self.step, **options)

    def begin_warmup(self) -> Optimizer:
        self.refiner.freeze_encoder()
        self.refiner.set_top_k(self.recipe.warmup.top_k)
        return adamw(self._head_groups(), self.recipe.betas)

    def begin_refinement(self) -> Optimizer:
        self.refiner.unfreeze_encoder()
        self.refiner.set_top_k(self.recipe.refinement.top_k)
        return adamw(self.encoder_groups() + self._head_groups(), self.recipe.betas)

    def encoder_groups(self) -> list[dict[str, object]]:
        encoder = self.refiner.backbone.model
        decay = self.recipe.refinement.layer_decay
        scales = layer_decay_scales(encoder, decay) if decay < 1 else None
        return parameter_groups(encoder.named_parameters(), weight_decay=self.recipe.weight_decay, scales=scales)

    def _head_groups(self) -> list[dict[str, object]]:
        return parameter_groups(self.refiner.heads.named_parameters(), weight_decay=self.recipe.head_weight_decay)

    def update_ema(self) -> None:
        self.ema.update(self.refiner.backbone, self.recipe.ema_decay)

    def step(self, batch: ViewBatch, generator: torch.Generator) -> StepOutput:
        """Gradients of all views and heads into the parameters; returns the loss and what the heads saw."""
        views = [
            photometric(view.to(self.device, non_blocking=True), generator, process_rows(len(view)))
            for photometric, view in zip(self.photometrics, batch.views, strict=True)
        ]
        sample_ids = batch.sample_ids.to(self.device, non_blocking=True)
        heads = self.recipe.heads
        losses = partial(
            self.refiner.head_losses,
            sample_ids=sample_ids,
            num_global=NUM_GLOBAL,
            temperature=heads.temperature,
            view_pairing=heads.view_pairing,
            swap_negatives=heads.swap_negatives,
            generator=generator,
        )
        mixed = partial(autocast, self.precision, self.device)
        output = forward_backward(self.refiner, views, losses, micro_batch=self.recipe.micro_batch, mixed=mixed)
        metrics: dict[str, Tensor] = {}
        for block, head in output.heads.items():
            metrics |= {f"{key}/{block}": value for key, value in self._head_metrics(head, sample_ids).items()}
        return StepOutput(output.loss.detach(), metrics)

    def _head_metrics(self, head: HeadOutput, sample_ids: Tensor) -> dict[str, Tensor]:
        metrics = {
            "loss": head.loss.detach(),
            "alignment": head.alignment.detach(),
            "neighbor_similarity": head.neighbor_similarity.mean(),
            "neighbor_age": head.neighbor_age.float().mean(),
        }
        if self.labels is not None:
            own = self.labels[sample_ids].repeat(NUM_GLOBAL)
            neighbor = self.labels[head.neighbor_sample_ids.clamp(min=0)]
            known = head.neighbor_sample_ids >= 0  # entries of the random start have no label
            metrics["neighbor_accuracy"] = ((own == neighbor) & known).sum() / known.sum().clamp(min=1)
        return metrics
