"""How each kind of timm model turns images into tokens and runs a single block.

A runner holds no state; it is what the kinds differ in, apart from :class:`Backbone`, which is what they share.
"""

from __future__ import annotations

import sys
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim_refiner.errors import InputError
from mim_refiner.models.beit import enable_any_grid, shared_bias
from mim_refiner.models.capi import CapiVisionTransformer, token_positions
from mim_refiner.models.positions import Grid, resize_absolute
from mim_refiner.models.postnorm import PostNormVisionTransformer
from mim_refiner.models.variants import VariantVisionTransformer
from mim_refiner.models.vit import registered_name


class PlainRunner:
    """timm's VisionTransformer: class token, registers, one table of positions."""

    def prepare(self, model: Any) -> None:
        """What timm's ``dynamic_img_size=True`` sets at construction, on a model built without it."""
        if model.dynamic_img_size:
            return
        model.dynamic_img_size = True
        patch_embed = model.patch_embed
        patch_embed.strict_img_size = False
        patch_embed.flatten = False
        patch_embed.output_fmt = type(patch_embed.output_fmt)("NHWC")

    def embed(self, model: Any, images: Tensor, rule: str) -> Tensor:
        """Tokens [B, P+N, D] that enter block 0, for images [B, C, H, W]."""
        x = model.patch_embed(images)
        grid, tokens = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
        table = model.pos_embed
        if table is not None:
            num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            native = tuple(model.patch_embed.grid_size)
            table = resize_absolute(table, native, grid, num_prefix=num_prefix, rule=rule)
        if table is not None and model.no_embed_class:
            tokens = tokens + table
        tokens = torch.cat([*prefix, tokens], dim=1)
        if table is not None and not model.no_embed_class:
            tokens = tokens + table
        tokens = model.pos_drop(tokens)
        if isinstance(model.patch_drop, nn.Module):
            tokens = model.patch_drop(tokens)
        return model.norm_pre(tokens)

    def context(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Any:
        """What all blocks need beside the tokens; built once a call."""
        return None

    def arguments(self, context: Any, index: int) -> tuple[Any, ...]:
        """Arguments of block ``index`` after the tokens."""
        return ()


class RotaryRunner(PlainRunner):
    """CAPI: positions instead of a table."""

    def context(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Tensor:
        return token_positions(grid, model.num_reg_tokens, device)

    def arguments(self, context: Any, index: int) -> tuple[Any, ...]:
        return (context,)


class BeitRunner(PlainRunner):
    """timm's Beit: a bias of relative positions, shared or in every block, beside or instead of the table."""

    def prepare(self, model: Any) -> None:
        enable_any_grid(model)

    def embed(self, model: Any, images: Tensor, rule: str) -> Tensor:
        tokens = model.patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if model.pos_embed is not None:
            native = tuple(model.patch_embed.grid_size)
            grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
            tokens = tokens + resize_absolute(model.pos_embed, native, grid, num_prefix=1, rule=rule)
        tokens = model.pos_drop(tokens)
        return tokens

    def context(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Any:
        return shared_bias(model, grid, rule)

    def arguments(self, context: Any, index: int) -> tuple[Any, ...]:
        return (context,)


class EvaRunner(PlainRunner):
    """timm's Eva (EVA, EVA-02): a table of positions and rotary embeddings of the patches."""

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        if getattr(model.rope, "_use_cached_embed", False) and hasattr(model.rope, "bands"):
            model.rope._use_cached_embed = False  # computed for the grid asked for, not kept for one

    def context(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Any:
        if model.rope is None:
            return None
        if hasattr(model.rope, "update_feat_shape"):
            model.rope.update_feat_shape(list(grid))  # of kinds that keep the embedding of one grid
        embedding = model.rope.get_embed(shape=list(grid))
        return list(embedding) if model.rope_mixed else embedding

    def arguments(self, context: Any, index: int) -> tuple[Any, ...]:
        return (context[index] if isinstance(context, list) else context,)


def free_image_size(model: Any) -> None:
    """Let a built Swin take other image sizes: its windows are padded and their masks computed for each size."""
    masked = [module for module in model.modules() if hasattr(module, "dynamic_mask")]
    if masked and hasattr(model, "patch_embed"):
        model.patch_embed.strict_img_size = False
        for module in masked:
            module.dynamic_mask = True


def built_at(model: Any, image_size: tuple[int, int]) -> Any:
    """A new model of ``model``'s kind for images of (H, W) pixels, as timm builds it; ``model`` if that takes any size.

    Raises InputError for a size that it cannot be built at.
    """
    name, arguments = registered_name(model), getattr(model, "_model_args", {})
    try:
        with torch.random.fork_rng(devices=[]):
            new: Any = timm.create_model(name, pretrained=False, **(arguments | {"img_size": image_size}))
        if type(new) is not type(model):
            raise ValueError("it was changed after timm made it")
        return new
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "unexpected keyword argument 'img_size'" in str(error):
            return model  # convolutions
        height, width = image_size
        raise InputError(
            f"{name or type(model).__name__} cannot be built for images of {height}x{width} pixels "
            f"({' '.join(str(error).split())[:120]}); choose another image_size, or leave it out"
        ) from error


@torch.no_grad()
def rebuilt(model: Any, image_size: tuple[int, int]) -> Any:
    """:func:`built_at` with the weights of ``model``.

    What timm resizes when it loads weights of another size is resized so (relative tables); tables of absolute
    positions, which it then refuses, bicubically with antialiasing.
    """
    new = built_at(model, image_size)
    if new is model:
        return model
    state = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = dict(convert(state, new) if convert else state)
    for key, value in new.state_dict().items():
        if key.rpartition(".")[2] == "pos_embed" and state[key].shape != value.shape:
            grids = [tuple(getattr(m, "tokens_spatial_shape", None) or m.patch_embed.grid_size) for m in (model, new)]
            state[key] = resample_abs_pos_embed(state[key], list(grids[1]), list(grids[0]), num_prefix_tokens=0)
    new.load_state_dict(state)
    for ours, theirs in zip(new.modules(), model.modules(), strict=True):
        if hasattr(theirs, "eps"):
            ours.eps = theirs.eps
    free_image_size(new)
    return new.train(model.training).to(next(model.parameters()))


_RUNNERS: dict[type, PlainRunner] = {
    VisionTransformer: PlainRunner(),
    PostNormVisionTransformer: PlainRunner(),
    VariantVisionTransformer: PlainRunner(),
    CapiVisionTransformer: RotaryRunner(),
    Beit: BeitRunner(),
    Eva: EvaRunner(),
}


def runner_for(model: Any) -> PlainRunner | None:
    """The runner of a model's kind; None for one that is only asked through its ``forward_intermediates``."""
    return _RUNNERS.get(type(model))
