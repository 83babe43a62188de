"""Build plain timm Vision Transformers by name, and read their construction arguments back from a built one."""

from __future__ import annotations

import re
from typing import Any

import timm
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mim_refiner.errors import InputError, did_you_mean
from mim_refiner.models.positions import check_image_size
from mim_refiner.types import side_or_pair

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Registered timm name that custom sizes are based on; every argument that matters is written beside it.
BASE_ARCHITECTURE = "vit_tiny_patch16_224"

# timm's modules of plain ViTs, all of which take ``dynamic_img_size``.
VIT_MODULES = ["vision_transformer", "deit"]

# Custom sizes: "vit_w128_d12_h4_p8", or as reports print them, "vit(dim=128,depth=12,heads=4,patch=8)".
_SHORT = re.compile(r"vit_w(\d+)_d(\d+)_h(\d+)_p(\d+)")
_LONG = re.compile(r"vit\(dim=(\d+),depth=(\d+),heads=(\d+),patch=(\d+)\)")

# (width, depth, heads) -> size name in timm's registry.
SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}

# Kinds of models whose sizes are free, by class.
_KINDS = {
    "VisionTransformer": "vit",
    "PostNormVisionTransformer": "vit_postnorm",
    "VariantVisionTransformer": "vit_variant",
    "CapiVisionTransformer": "vit_capi",
    "Beit": "beit",
}


def create_vit(arch: str, image_size: int | tuple[int, int] | None = None, **kwargs: Any) -> VisionTransformer:
    """Build a randomly initialised timm ViT without a classifier that takes any multiple of its patch size.

    ``arch`` is a timm model name ("vit_tiny_patch16_224") or a custom size of ours: "vit_w128_d12_h4_p8" (width,
    depth, heads, patch). ``kwargs`` go to timm and win over the name (``in_chans``, ``reg_tokens``, ...).
    Raises InputError for a name that is unknown or no plain ViT's, a width that the heads do not divide, or an image
    size that the patch does not divide.
    """
    name, arguments = parse_architecture(arch)
    if not is_model_in_modules(name.partition(".")[0], [*VIT_MODULES, "kinds"]):  # the last are ours
        raise InputError(f"architecture '{arch}' is no plain ViT of timm; take one, such as vit_small_patch16_224")
    arguments |= {"num_classes": 0, "dynamic_img_size": True} | kwargs
    if image_size is not None:
        arguments["img_size"] = image_size
    width, heads = arguments.get("embed_dim"), arguments.get("num_heads")
    if width and heads and width % heads:
        raise InputError(f"architecture '{arch}': width {width} is not a multiple of {heads} heads; change one of them")
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError) as error:
        raise InputError(
            f"architecture '{arch}' cannot be built with {arguments} ({' '.join(str(error).split())}); change them"
        ) from error
    patch_embed = getattr(model, "patch_embed", None)
    if image_size is not None and patch_embed is not None:
        check_image_size(patch_embed.img_size, patch_embed.patch_size)
    return model


def parse_architecture(arch: str) -> tuple[str, dict[str, Any]]:
    """Return (timm model name, size arguments) of a timm name or of a custom size string; InputError otherwise."""
    match = _SHORT.fullmatch(arch) or _LONG.fullmatch(arch.replace(" ", ""))
    if match:
        width, depth, heads, patch = (int(group) for group in match.groups())
        if 0 in (width, depth, heads, patch):
            raise InputError(f"architecture '{arch}': width, depth, heads and patch must all be at least 1")
        return BASE_ARCHITECTURE, {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    if not timm.is_model(arch.split(".")[0]):
        whole = f"{arch}_patch16_224"  # of vit_small and the like
        close = did_you_mean(whole if timm.is_model(whole) else arch, timm.list_models("*vit*"))
        raise InputError(
            f"unknown architecture '{arch}'{close}; use a timm name or vit_w<width>_d<depth>_h<heads>_p<patch>"
        )
    return arch, {}


def architecture_name(model: Any) -> str:
    """timm's name of a registered size or another kind, else one as vit(dim=128,depth=12,heads=4,patch=8)."""
    registered, kind = registered_name(model), _KINDS.get(type(model).__name__)
    if kind is None:
        return str(registered or type(model).__name__)
    width, depth, heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
    patch = model.patch_embed.patch_size
    size = SIZES.get((width, depth, heads))
    if size and registered and f"_{size}_patch{patch[0]}_" in registered:
        return registered
    standard = standard_name(width, depth, heads, patch) if kind == "vit" else None
    if standard is not None:
        return standard
    shown = str(patch[0]) if patch[0] == patch[1] else f"{patch[0]}x{patch[1]}"
    return f"{kind}(dim={width},depth={depth},heads={heads},patch={shown})"


def standard_name(width: int, depth: int, heads: int, patch_size: tuple[int, int]) -> str | None:
    """timm's name of the plain ViT of this size ("vit_base_patch16_224"), None for a size it does not have."""
    size = SIZES.get((width, depth, heads))
    name = f"vit_{size}_patch{patch_size[0]}_224"
    return name if size and patch_size[0] == patch_size[1] and timm.is_model(name) else None


def registered_name(model: nn.Module) -> str | None:
    """The timm name a model was created under, None for a model that was built by its class."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    return str(name) if name and timm.is_model(name) else None


def vit_arguments(model: VisionTransformer) -> dict[str, Any]:
    """Constructor arguments, JSON-ready, that rebuild ``model``'s structure; read from its modules, not from a record.

    So a model resized or assembled by hand is described as it is. Activation and norm layer types are not covered:
    they come with the registered name.
    """
    block = model.blocks[0]
    layer_scale = getattr(block.ls1, "gamma", None)
    has_fc_norm = not isinstance(model.fc_norm, nn.Identity)
    has_norm = not isinstance(model.norm, nn.Identity)
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": side_or_pair(tuple(model.patch_embed.patch_size)),
        "in_chans": in_channels(model),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio((getattr(block.mlp, "fc1", None) or block.mlp.fc1_g).out_features, model.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        # The value is only the initial one; the weights replace it. timm would drop None and take the name's own value.
        "init_values": 0.0 if layer_scale is None else 1e-5,
        "class_token": model.cls_token is not None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": has_norm or has_fc_norm,
        "fc_norm": has_fc_norm,
        "global_pool": model.global_pool,
        "dynamic_img_size": True,
    }


def in_channels(model: nn.Module) -> int:
    """Channels of the images: those of the first convolution."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def mlp_ratio(hidden: int, width: int) -> float:
    """What timm multiplies ``width`` by, and rounds down, to get ``hidden``."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
