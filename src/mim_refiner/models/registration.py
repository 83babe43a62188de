"""Make our kinds of ViT known to timm, so that they are built by name as timm's own."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["register"]

default_cfgs: dict[str, Any] = {}  # timm looks here for what it knows of a name


def register(name: str, kind: type) -> None:
    """``timm.create_model(name, ...)`` builds a ``kind``; its size by timm's arguments (embed_dim, depth, ...)."""

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        return build_model_with_cfg(kind, name, pretrained, **kwargs)

    about = {
        "input_size": (3, 224, 224),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    default_cfgs.update(generate_default_cfgs({f"{name}.untrained": about}))
    build.__name__ = name
    register_model(build)
