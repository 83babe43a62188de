"""Write an encoder as a folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mim_refiner.data.loaders import default_crop_ratio
from mim_refiner.errors import InputError
from mim_refiner.export.parity import CheckImages
from mim_refiner.export.writing import Format, Pairs, write_export
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.vit import BASE_ARCHITECTURE, registered_name, standard_name, vit_arguments


def export_timm(
    backbone: Backbone,
    out_dir: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    images: CheckImages | None = None,
) -> dict[str, Any]:
    """Write config.json, model.safetensors and README.md; arguments and result as of :func:`write_export`."""
    return write_export(TIMM, backbone, out_dir, card=card, facts=facts, images=images)


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """The config.json of the folder, in the layout that timm's ``local-dir:`` and ``hf-hub:`` sources read."""
    model, info = backbone.model, backbone.info
    if type(model) is VisionTransformer:
        arguments = {name: value for name, value in vit_arguments(model).items() if value is not None}
    else:
        recorded = getattr(model, "_model_args", {})  # what timm's factory was called with
        arguments = {name: value for name, value in recorded.items() if name != "num_classes"}
        if "img_size" in arguments:  # it may have changed since
            arguments["img_size"] = list(info.image_size)
    architecture = registered_name(model)
    if type(model) is VisionTransformer and architecture in (None, BASE_ARCHITECTURE):
        # The name is free here, since every argument is written; take the one that tells the size.
        architecture = standard_name(info.embed_dim, info.depth, info.num_heads, info.patch_size) or BASE_ARCHITECTURE
    if architecture is None:
        raise InputError(f"{type(model).__name__} was not made by timm.create_model, so timm cannot rebuild it")
    return {
        "architecture": architecture,
        "num_classes": int(getattr(model, "num_classes", 0)),
        "num_features": info.embed_dim,
        "global_pool": getattr(model, "global_pool", ""),
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "mim_refiner",
            "input_size": [info.in_chans, *info.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": default_crop_ratio(max(info.image_size)),
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": int(getattr(model, "num_classes", 0)),
            "pool_size": None,
            "first_conv": _default(model, "first_conv", "patch_embed.proj"),
            "classifier": _default(model, "classifier", "head"),
            "license": info.licence,
        },
    }


def _write(backbone: Backbone, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    config = timm_config(backbone)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def _pairs(backbone: Backbone, folder: Path, images: Tensor, facts: Mapping[str, Any]) -> Pairs:
    """Every block's output and the final tokens, as timm itself gives them."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # whatever timm raises for weights that do not fit the model it builds
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--format timm: timm cannot rebuild {backbone.info.architecture} ({reason})") from error
    reloaded = Backbone(model, backbone.info)
    reloaded.use_math_attention()  # the same kernel on both sides
    yield from zip(_outputs(backbone.model, images), _outputs(reloaded.model, images), strict=True)


def _outputs(model: Any, images: Tensor) -> list[Tensor]:
    final, blocks = model.forward_intermediates(images, output_fmt="NCHW")
    return [*blocks, final]


def _default(model: Any, key: str, otherwise: str) -> Any:
    config = getattr(model, "pretrained_cfg", None)
    return config.get(key, otherwise) if isinstance(config, dict) else otherwise


TIMM = Format("timm", 1e-6, "timm", "every block and the final tokens", _write, _pairs)
