"""Masked-autoencoder pre-training: mask, predict normalised pixels, AdamW with warm-up and cosine."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from mim_refiner.core.collectives import average_gradients, is_distributed, process_rows, rank
from mim_refiner.core.optim import adamw, parameter_groups, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.training.loop import Loop, Monitor, step_generator
from mim_refiner.training.recipe import PretrainRecipe
from mim_refiner.training.state import RunFolder


def pretrain(
    mae: MaskedAutoencoder,
    recipe: PretrainRecipe,
    loader: TrainLoader,
    photometric: BatchPhotometric,
    folder: RunFolder,
    run: Run,
    monitor: Monitor | None = None,
) -> None:
    """Train from wherever the run in ``folder`` stands; stops, retries and raises as :func:`training.refine.train`."""
    loop = Loop(folder, run, recipe, loader, {"model": mae}, monitor)
    while not loop.finished:
        with loop.attempt():
            if loop.position.phase == 0:
                train_steps(mae, recipe, photometric, loop)


def train_steps(mae: MaskedAutoencoder, recipe: PretrainRecipe, photometric: BatchPhotometric, loop: Loop) -> None:
    """The only phase, step by step."""
    run = loop.run
    mae.train()
    optimizer = adamw(parameter_groups(mae.named_parameters(), weight_decay=recipe.weight_decay), recipe.betas)
    loop.begin(0, "pretrain", recipe.training, optimizer)
    with closing(loop.batches()) as batches:
        for step, batch in batches:
            generator = step_generator(run.seed, 0, step)  # of all the step's draws
            crops = batch.views[0].to(run.device, non_blocking=True)
            images = photometric(crops, generator, process_rows(len(crops)))
            if is_distributed():  # other masks on every rank
                generator = torch.Generator().manual_seed(generator.initial_seed() + rank())
            optimizer.zero_grad(set_to_none=True)
            loss = forward_backward(mae, images, generator, run, recipe.micro_batch)
            average_gradients(mae.parameters())
            loop.log.add(step, loss, {}, len(images))
            with loop.update(step) as learning_rate:
                set_learning_rate(optimizer, learning_rate)
                optimizer.step()


def forward_backward(
    mae: MaskedAutoencoder, images: Tensor, generator: torch.Generator | None, run: Run, micro_batch: int | None = None
) -> Tensor:
    """Leave the gradients of ``images`` [B, C, H, W] in the parameters and return their mean loss.

    ``micro_batch`` images at a time: each has as many masked patches, so shares of the means of parts make the mean.
    """
    losses = []
    for part in images.split(micro_batch or len(images)):
        with run.autocast():
            loss = mae(part, generator=generator).loss * (len(part) / len(images))
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
