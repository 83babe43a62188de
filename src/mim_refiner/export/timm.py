"""Write an encoder as a folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim_refiner.errors import InputError
from mim_refiner.export.writing import Format, Pairs, every_block, write_export
from mim_refiner.files import errors_as
from mim_refiner.models.backbone import Backbone, norm_eps
from mim_refiner.models.kinds import CapiVisionTransformer
from mim_refiner.models.vit import BASE_ARCHITECTURE, registered_name, standard_name, vit_arguments
from mim_refiner.types import default_crop_ratio, side_or_pair


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """The folder's config.json in timm's layout; InputError for a model that timm cannot rebuild from it."""
    model, info = backbone.model, backbone.info
    if type(model) is VisionTransformer:
        arguments = vit_arguments(model)
    else:
        recorded = getattr(model, "_model_args", {})  # by timm's factory, and by its changes of the image size
        arguments = {name: value for name, value in recorded.items() if name != "num_classes"}
    architecture = registered_name(model)
    if type(model) is VisionTransformer and architecture in (None, BASE_ARCHITECTURE):
        # The name is free here, since every argument is written; take the one that tells the size.
        architecture = standard_name(info.embed_dim, info.depth, info.num_heads, info.patch_size) or BASE_ARCHITECTURE
    problem = f"{type(model).__name__} was made by timm.create_model with an argument that no config.json can hold"
    with errors_as(InputError, problem, "name it in plain values", TypeError):
        json.dumps(arguments)
    if architecture is None:
        raise InputError(f"{type(model).__name__} was not made by timm.create_model; load it by load_backbone")
    pool, known = getattr(model, "global_pool", ""), getattr(model, "pretrained_cfg", None) or {}
    return {
        "architecture": architecture,
        "num_classes": int(getattr(model, "num_classes", 0)),
        "num_features": info.embed_dim,
        "global_pool": getattr(pool, "pool_type", pool),  # CNNs hold a layer there
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "mim_refiner",
            "input_size": [info.in_chans, *info.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": default_crop_ratio(side_or_pair(info.image_size)),
            **({"crop_mode": "squash"} if info.image_size[0] != info.image_size[1] else {}),
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": int(getattr(model, "num_classes", 0)),
            "pool_size": None,
            "first_conv": known.get("first_conv", "patch_embed.proj"),
            "classifier": known.get("classifier", "head"),
            "license": info.licence,
        },
    }


def _write(backbone: Backbone, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    config = timm_config(backbone)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    model, width = backbone.model, backbone.info.embed_dim
    if type(model) is Beit and isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        # timm's Beit has one norm at least; the one after pooling changes no token. Our reader leaves it out again.
        config["model_args"] |= {"use_fc_norm": True, "global_pool": "avg"}
        state |= {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}
        facts["without"] = ["fc_norm"]
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in config["model_args"].items()}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # what timm builds of it, without memory
        eps = norm_eps(timm.create_model(config["architecture"], pretrained=False, num_classes=0, **given))
    if backbone.info.norm_eps not in (None, eps):
        facts["set_norm_eps"] = backbone.info.norm_eps  # no argument of timm's says it; the card's snippet does
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def _pairs(backbone: Backbone, folder: Path, images: Tensor, facts: dict[str, Any]) -> Pairs:
    """Every block's output and the final tokens, as timm itself gives them after the lines of the card's snippet."""
    problem = f"--format timm: timm cannot rebuild {backbone.info.architecture}"
    with errors_as(InputError, problem, "keep its run folder instead"):  # whatever timm raises for weights that misfit
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    reloaded = Backbone.wrap(model) if isinstance(model, CapiVisionTransformer) else Backbone(model, backbone.info)
    reloaded.use_math_attention()  # the same kernel on both sides
    ours = _outputs(backbone, images)
    if "set_norm_eps" in facts:
        plain = zip(ours, _outputs(reloaded, images), strict=True)
        facts["difference_with_timms_norm_eps"] = max(float((a - b).abs().max()) for a, b in plain)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = facts["set_norm_eps"]
    yield from zip(ours, _outputs(reloaded, images), strict=True)


def _outputs(backbone: Backbone, images: Tensor) -> list[Tensor]:
    if isinstance(backbone.model, CapiVisionTransformer):  # its blocks need positions, which timm's loop does not give
        return every_block(backbone, images)
    final, intermediates = backbone.model.forward_intermediates(images, output_fmt="NCHW")
    return [*intermediates, final]


TIMM = Format("timm", 1e-6, "timm", "every block and the final tokens", _write, _pairs)
export_timm = partial(write_export, TIMM)
