"""Build the model that a converted checkpoint describes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn

from mim_refiner.checkpoints.families import Converted
from mim_refiner.checkpoints.families.base import LAYER_SCALE
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.files import errors_as
from mim_refiner.models import kinds  # noqa: F401  (registers their architectures with timm)
from mim_refiner.models.vit import VIT_MODULES, create_vit
from mim_refiner.reporting import number_of

# Bounds on what a file may make us build: a name or a config.json must not cost memory that no encoder needs.
MAX_PIXELS = 2**27  # of an image size that is asked for
_MAX_DEPTH = 512  # blocks; the deepest published encoders have under 100
_MAX_CHANNELS = 4096  # of images; hyperspectral sensors have some hundred
_MAX_SIZE = 2**20  # width, pixels, heads, channels

_IN_BLOCKS = re.compile(r"\.\d+\.")  # blocks and stages are lists


def build(converted: Converted, where: str) -> Any:
    """The timm model of a conversion, at the file's own image size; CheckpointError if timm cannot build it."""
    arguments = dict(converted.arguments)
    if converted.num_heads > 0:
        arguments["num_heads"] = converted.num_heads
    if ":" in converted.architecture or "/" in converted.architecture:  # timm would fetch or open it
        raise CheckpointError(f"{where}: {ascii(converted.architecture)[:60]} is an address; name a timm model")
    for name, value in arguments.items():  # beyond any encoder's: a damaged or hostile name or config.json
        bound = _MAX_DEPTH if "depth" in name else _MAX_SIZE
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, int | float) and not abs(number) <= bound for number in values):
            raise CheckpointError(f"{where}: {name}={str(value)[:40]} is beyond any encoder's; correct its config.json")
    remedy = "correct its config.json, or take the files from their source again"
    problem = f"{where}: timm cannot build '{converted.architecture}' as described"
    with errors_as(CheckpointError, problem, remedy, Exception):  # raised is almost anything for what does not fit
        if is_model_in_modules(converted.architecture.partition(".")[0], VIT_MODULES):
            model: Any = create_vit(converted.architecture, **arguments)
        else:
            model = timm.create_model(converted.architecture, pretrained=False, num_classes=0, **arguments)
    for name in converted.without:
        if name == LAYER_SCALE:  # timm's constructors of some always give it
            for block in (module for module in model.modules() if hasattr(module, "gamma_1")):
                block.gamma_1 = block.gamma_2 = None
            continue
        if not isinstance(getattr(model, name, None), nn.LayerNorm | nn.RMSNorm | nn.Identity):
            raise CheckpointError(f"{where}: an encoder cannot be without {ascii(name)[:40]}; correct its config.json")
        setattr(model, name, nn.Identity())
    if not any(parameter.ndim > 1 for name, parameter in model.named_parameters() if _IN_BLOCKS.search(name)):
        raise CheckpointError(f"{where}: '{converted.architecture}' has no blocks; correct its config.json")
    if converted.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.eps = converted.norm_eps
    return model


def adapt_channels(converted: Converted, in_chans: int) -> Converted:
    """Patch projection for another number of input channels, as timm does it.

    One channel gets the sum of all; otherwise channels repeat in order, scaled so that a constant image gives the
    same tokens on average. Raises InputError for a number below 1 and for an encoder without patch projection.
    """
    if in_chans < 1:
        raise InputError(f"in_chans must be at least 1, got {in_chans}")
    if in_chans > _MAX_CHANNELS:
        raise InputError(f"in_chans={in_chans} is more than any sensor has (at most {_MAX_CHANNELS}); correct it")
    weight = converted.tensors.get(converted.projection)
    if weight is None or weight.ndim != 4:
        raise InputError(f"in_chans: '{converted.architecture}' has no patch projection to adapt; leave in_chans out")
    channels = weight.shape[1]
    if channels == in_chans:
        return converted

    def repeat(values: tuple[float, ...]) -> tuple[float, ...]:  # as the projection's channels are laid out
        return (sum(values) / len(values),) if in_chans == 1 else tuple(islice(cycle(values), in_chans))

    adapted = weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)
    if in_chans == 1:
        adapted = weight.sum(dim=1, keepdim=True)
    return replace(
        converted,
        arguments=converted.arguments | {"in_chans": in_chans},
        tensors=converted.tensors | {converted.projection: adapted},
        mean=converted.mean and repeat(converted.mean),
        std=converted.std and repeat(converted.std),
        notes=(
            *converted.notes,
            f"the patch projection was adapted from {channels} to {number_of(in_chans, 'channels')}",
        ),
    )
