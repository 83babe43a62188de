"""``pretrain``: a masked autoencoder from images alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands import inputs
from mim_refiner.commands.loggers import logged
from mim_refiner.commands.monitor import TRAINED_ON, OnlineKnn
from mim_refiner.commands.plan import available_memory, process_of
from mim_refiner.core.device import resolve_precision
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.launch import together
from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.data.views import ViewSpec
from mim_refiner.errors import InputError
from mim_refiner.export.timm import export_timm
from mim_refiner.files import name_of
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.reporting import Reporter, listener, number_of
from mim_refiner.settings import setting_texts
from mim_refiner.training.estimate import pretrain_estimate
from mim_refiner.training.loop import stops_cleanly
from mim_refiner.training.pretrain import pretrain as train
from mim_refiner.training.recipe import PretrainRecipe
from mim_refiner.training.recipes import pretrain_recipe
from mim_refiner.training.state import RunFolder
from mim_refiner.types import ImageSize, height_width


@stops_cleanly()
@together()
@logged
def pretrain(
    *,
    data: Any,
    arch: str | None = None,
    out: str,
    model: Any = None,
    recipe: str | None = None,
    settings: str | Sequence[str] | Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    exclude: str | None = None,
    log: str | Sequence[str] = (),
    memory_budget: str | None = None,
    plan: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Pre-train ``arch`` (a timm ViT name, or ``vit_w<width>_d<depth>_h<heads>_p<patch>``) as a masked autoencoder.

    ``model`` instead of ``arch`` goes on from a ViT that is trained already; a run folder of pretrain brings its
    decoder too when it has the recipe's sizes, otherwise the decoder is new. ``data``: images, labels optional (used
    for online k-NN only), without those listed in ``exclude``. ``log``: further loggers (tensorboard, wandb, mlflow).
    A step that does not fit into ``memory_budget`` ("24GB"; default: what is free) goes in micro-batches; ``plan`` only
    returns what the run would cost.
    Writes a run folder whose export/ is a timm folder. The same call on the same folder resumes. Returns the summary.
    Raises MimRefinerError with one line on bad input.
    """
    reporter, settings = listener(reporter), setting_texts(settings)
    started = time.perf_counter()
    if (arch is None) == (model is None):
        raise InputError("pretrain needs --arch for a new encoder, or --model to go on from one; give one of them")
    given = None if model is None else name_of(model)
    run = inputs.join_training(None if plan else out, device, seed, reporter)
    images = inputs.open_images(data, reporter, exclude=exclude)
    inputs.refuse_to_overwrite_inputs(out, overwrite, data=data, model=model)
    # the size decides which recipe is the default, and a setting or a named recipe may decide the size
    size = pretrain_recipe(recipe, settings, image_size=0).image_size or inputs.common_image_size(images)
    chosen = pretrain_recipe(recipe, settings, image_size=max(height_width(size)), images=len(images))
    chosen.image_size = size
    run = replace(run, precision=resolve_precision(chosen.precision, run.device))

    backbone = start(arch, model, size, out)
    weights = None if model is None else weights_sha256(backbone.model)
    inputs.refuse_other_work(chosen, run, weights or arch, images=images)
    inputs.run_fast(backbone, chosen, run)
    torch.manual_seed(seed)
    mae = make_autoencoder(backbone.model, chosen, given).to(run.device)

    view = ViewSpec("mae", size, scale=chosen.crop_scale, jitter_prob=0.0, gray_prob=0.0)
    loader = inputs.train_loader(images, [view], chosen, run)
    photometric = BatchPhotometric(view, backbone.info.mean, backbone.info.std)
    ended = inputs.ended_run(None if overwrite or plan else Path(out), {}, ("export/config.json",))
    if ended is None:
        free = available_memory(memory_budget, run)
        process = process_of(loader, run)
        chosen, cost = pretrain_estimate(mae, chosen, loader, photometric, free, run, process)
    if plan:
        return {"plan": cost.record()}
    asked = {"command": "pretrain", "data": name_of(data), "arch": arch, "model": given, "model_sha256": weights,
             "seed": seed, "exclude": exclude}  # fmt: skip
    folder = inputs.open_run(out, inputs.known_by(asked, chosen, images), reporter, overwrite, started)
    if ended is not None:
        reporter.message(inputs.ENDED)
        return ended if folder.writes else {}
    skipped = inputs.list_skipped(images, folder, reporter)
    what = f"{arch or given}: {sum(map(torch.numel, backbone.model.parameters())) / 1e6:.1f} M parameters, {size} px"
    epochs, rate = number_of(chosen.training.epochs, "epochs"), chosen.training.base_lr
    reporter.message(
        f"{what}, {number_of(len(images), 'images')}, {epochs} of {number_of(loader.steps_per_epoch, 'steps')}, "
        f"{run.precision}; learning rate base {rate:.3g}, peak {peak_learning_rate(rate, chosen.batch_size):.3g}"
    )
    reporter.message(cost.line)
    pooling, blocks = "cls" if backbone.info.has_cls else "mean", range(backbone.info.depth)
    monitor = OnlineKnn.watching(chosen, backbone, images, blocks=blocks, pooling=pooling, run=run)
    with contextlib.closing(loader):
        train(mae, chosen, loader, photometric, folder, run, monitor)
    inputs.list_skipped(images, folder, reporter, skipped)
    after = {"after": monitor(), "measured_on": TRAINED_ON} if monitor else {}
    card = {"base": Path(given).name if given else "trained from scratch", "data": Path(name_of(data)).name}
    return conclude(backbone, card, chosen, images, folder, **after) if folder.writes else {}  # the rest is rank 0's


def conclude(
    backbone: Backbone, card: dict[str, Any], recipe: PretrainRecipe, images: ImageSet, folder: RunFolder, **after: Any
) -> dict[str, Any]:
    """Export the encoder and write the summary, which is returned."""
    card["data"] += f" ({number_of(len(images), 'images')})"
    card["recipe"] = recipe.model_dump(mode="json", exclude={"expected"})
    export = folder.path / "export"
    export_timm(backbone.to("cpu"), export, card=card)
    summary = {"run": str(folder.path), "export": str(export), "data": {"train": images.facts()},
               "seconds": {"total": folder.seconds}, **after}  # fmt: skip
    inputs.write_summary(folder.path, summary, {})
    return summary


def start(arch: str | None, model: Any, size: ImageSize, out: str) -> Backbone:
    """A new encoder ``arch``, or the one of ``model``. Raises InputError for one that is no plain ViT."""
    if model is None:
        assert arch is not None
        encoder = create_vit(arch, image_size=size)
        backbone = Backbone.wrap(encoder, family="mae", architecture=arch, licence="as your images allow", source=out)
    else:
        backbone = load_backbone(model, image_size=size)
    if type(backbone.model) is not VisionTransformer:
        given = f"--arch {arch}" if model is None else f"--model {model}"
        raise InputError(
            f"{given}: masked-autoencoder pre-training takes a plain ViT, not "
            f"{type(backbone.model).__name__}; give a ViT, or --arch for a new one"
        )
    return backbone


def make_autoencoder(encoder: VisionTransformer, recipe: PretrainRecipe, model: str | None = None) -> MaskedAutoencoder:
    """The encoder with a decoder: all weights drawn anew, or with ``model`` the encoder's kept, and the decoder's too
    when ``model`` is a run folder of pretrain with a decoder of these sizes.
    """
    own = recipe.model_dump(include={"decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio"})
    mae = MaskedAutoencoder(encoder, **own).initialize(encoder=model is None)
    saved = Path(model or "") / "checkpoints" / "last" / "model.safetensors"
    if model is not None and saved.exists():
        decoder = {key: value for key, value in load_file(saved).items() if not key.startswith("encoder.")}
        new = mae.state_dict()
        if decoder and all(key in new and new[key].shape == value.shape for key, value in decoder.items()):
            mae.load_state_dict(decoder, strict=False)
    return mae
