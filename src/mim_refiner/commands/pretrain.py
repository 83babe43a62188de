"""``pretrain``: a masked autoencoder from images alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.commands.loggers import logging_to
from mim_refiner.commands.monitor import OnlineKnn
from mim_refiner.commands.runs import (
    common_image_size,
    list_skipped,
    open_images,
    open_run,
    refuse_to_overwrite_inputs,
    train_loader,
)
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.launch import join_processes
from mim_refiner.core.run import Run
from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.data.views import ViewSpec
from mim_refiner.export.timm import export_timm
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.reporting import NullReporter, Reporter
from mim_refiner.training.pretrain import pretrain as train
from mim_refiner.training.recipe import PretrainRecipe, override
from mim_refiner.training.recipes import pretrain_recipe
from mim_refiner.training.signals import stops_cleanly


@stops_cleanly
def pretrain(
    *,
    data: str,
    arch: str,
    out: str,
    recipe: str | None = None,
    settings: list[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    exclude: str | None = None,
    log: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Pre-train ``arch`` (a timm ViT name, or ``vit_w<width>_d<depth>_h<heads>_p<patch>``) as a masked autoencoder.

    ``data``: images, labels optional (used for online k-NN only), without those listed in ``exclude``. ``log``: further
    loggers (tensorboard, wandb, mlflow). Writes a run folder whose export/ is a timm folder. The same call on the same
    folder resumes. Returns the summary. Raises MimRefinerError with one line on bad input.
    """
    with logging_to(log, out, reporter or NullReporter()) as told:
        return _pretrain(data, arch, out, recipe, settings or [], device, seed, overwrite, exclude, told)


def _pretrain(
    data: str,
    arch: str,
    out: str,
    recipe: str | None,
    settings: list[str],
    device: str,
    seed: int,
    overwrite: bool,
    exclude: str | None,
    reporter: Reporter,
) -> dict[str, Any]:
    started = time.perf_counter()
    run = Run(join_processes(pick_device(device)), seed=seed, reporter=reporter)
    images = open_images(data, reporter, exclude=exclude)
    refuse_to_overwrite_inputs(out, overwrite, data=data)
    # the size decides which recipe is the default, and a setting or a named recipe may decide the size
    size = override(pretrain_recipe(recipe, image_size=0), settings).image_size or common_image_size(images)
    chosen = override(pretrain_recipe(recipe, image_size=size, images=len(images)), settings)
    chosen.image_size = size
    run = replace(run, precision=resolve_precision(chosen.precision, run.device))

    encoder = create_vit(arch, image_size=size)
    backbone = Backbone.wrap(encoder, family="mae", architecture=arch, licence="as your images allow", source=out)
    if run.device.type == "cpu":
        backbone.use_math_attention()
    if chosen.compile:
        backbone.compile_blocks()
    torch.manual_seed(seed)
    mae = make_autoencoder(encoder, chosen).to(run.device)

    view = ViewSpec("mae", size, scale=chosen.crop_scale, jitter_prob=0.0, gray_prob=0.0)
    loader = train_loader(images, [view], chosen, run)
    photometric = BatchPhotometric(view, backbone.info.mean, backbone.info.std)
    asked = {"command": "pretrain", "data": data, "arch": arch, "seed": seed, "exclude": exclude}
    folder = open_run(out, asked, chosen, images, overwrite=overwrite)
    skipped = list_skipped(images, folder, reporter)
    peak = peak_learning_rate(chosen.training.base_lr, chosen.batch_size)
    reporter.message(
        f"{arch}: {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters, {size} px, "
        f"{len(images)} images, {chosen.training.epochs} epochs of {loader.steps_per_epoch} steps, {run.precision}; "
        f"learning rate base {chosen.training.base_lr:.3g}, peak {peak:.3g}"
    )
    watched = images.labels is not None and chosen.knn_every
    monitor = make_monitor(backbone, images, run) if watched else None
    with contextlib.closing(loader):
        train(mae, chosen, loader, photometric, folder, run, monitor)
    list_skipped(images, folder, reporter, skipped)
    after = monitor() if monitor else None
    if not folder.writes:  # the rest is rank 0's
        return {}

    card: dict[str, Any] = {"base": "trained from scratch", "data": f"{Path(data).name} ({len(images)} images)"}
    card["recipe"] = chosen.model_dump(mode="json")
    export_timm(backbone.to("cpu"), Path(out) / "export", card=card)
    summary = {
        "run": str(out),
        "export": str(Path(out) / "export"),
        "seconds": {"total": time.perf_counter() - started},
    }
    if after is not None:
        summary["after"] = after
    write_json(Path(out) / "summary.json", summary)
    return summary


def make_monitor(backbone: Backbone, images: ImageSet, run: Run) -> OnlineKnn:
    """Online k-NN of every block, on labelled training images."""
    pooling = "cls" if backbone.info.has_cls else "mean"
    blocks = range(backbone.info.depth)
    return OnlineKnn(backbone, images, None, blocks=blocks, pooling=pooling, run=run)


def make_autoencoder(encoder: VisionTransformer, recipe: PretrainRecipe) -> MaskedAutoencoder:
    """The encoder with a fresh decoder; all weights are drawn anew."""
    return MaskedAutoencoder(
        encoder,
        decoder_dim=recipe.decoder_dim,
        decoder_depth=recipe.decoder_depth,
        decoder_heads=recipe.decoder_heads,
        mask_ratio=recipe.mask_ratio,
    ).initialize()
