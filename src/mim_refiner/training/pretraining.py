"""Masked-autoencoder pre-training as the loop runs it."""

from __future__ import annotations

import torch

from mim_refiner.core.collectives import is_distributed, rank
from mim_refiner.core.device import autocast
from mim_refiner.core.rows import process_rows
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.training.optim import adamw, parameter_groups, phase_schedule
from mim_refiner.training.recipe import PretrainRecipe
from mim_refiner.training.trainer import StepOutput, TrainingPhase


def pretraining_phase(
    mae: MaskedAutoencoder,
    recipe: PretrainRecipe,
    loader: TrainLoader,
    photometric: BatchPhotometric,
    *,
    device: torch.device,
    precision: str,
) -> TrainingPhase:
    """The single phase of MAE pre-training: mask, predict normalised pixels, AdamW with warm-up and cosine."""

    def begin() -> torch.optim.Optimizer:
        mae.train()
        return adamw(parameter_groups(mae.named_parameters(), weight_decay=recipe.weight_decay), recipe.betas)

    def step(batch: ViewBatch, generator: torch.Generator) -> StepOutput:
        images = batch.views[0].to(device, non_blocking=True)
        images = photometric(images, generator, process_rows(len(images)))
        if is_distributed():  # other masks on every rank
            generator = torch.Generator().manual_seed(generator.initial_seed() + rank())
        with autocast(precision, device):
            loss = mae(images, generator=generator).loss
        loss.backward()
        return StepOutput(loss.detach())

    schedule = phase_schedule(recipe.training, recipe.batch_size, loader.steps_per_epoch)
    return TrainingPhase("pretrain", recipe.training.epochs, loader, schedule, begin, step)
