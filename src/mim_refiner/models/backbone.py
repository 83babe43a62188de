"""An encoder as the rest of the package sees it: a timm model whose blocks can be asked for their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim_refiner.errors import InputError
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD, architecture_name, check_image_size, create_vit
from mim_refiner.types import BackboneInfo, BlockOutput

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "create_vit"]


class Backbone(nn.Module):
    """A timm model and what is known about it.

    A plain ``VisionTransformer`` runs block by block here: raw tokens, any resolution, any sub-range of blocks.
    Any other timm model is asked through its ``forward_intermediates``; such a model cannot run a sub-range.
    """

    def __init__(self, model: nn.Module, info: BackboneInfo) -> None:
        super().__init__()
        self.model: Any = model  # timm models carry no types
        self.info = info
        self.is_plain_vit = type(model) is VisionTransformer

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        *,
        family: str = "timm",
        architecture: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str = "unknown",
        coverage: float = 1.0,
        source: str = "",
    ) -> Backbone:
        """Wrap a timm model; its facts are read from the model itself.

        ``mean``/``std`` default to ImageNet's on the 0-1 scale. A plain ViT is switched to dynamic image sizes (its
        position table is then resampled bicubically with antialiasing, as timm does).
        Raises InputError for a model without ``forward_intermediates``.
        """
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"{type(model).__name__} has no forward_intermediates; use a timm ViT instead")
        if type(model) is VisionTransformer:
            _enable_dynamic_image_size(model)
        in_chans = _in_channels(model)
        info = BackboneInfo(
            family=family,
            architecture=architecture or architecture_name(model),
            mean=_per_channel(mean, IMAGENET_MEAN, in_chans),
            std=_per_channel(std, IMAGENET_STD, in_chans),
            in_chans=in_chans,
            licence=licence,
            coverage=coverage,
            source=source,
            **_structure(model),
        )
        return cls(model, info)

    def forward(
        self, images: Tensor, block_indices: Sequence[int] | None = None, *, norm: bool = False
    ) -> list[BlockOutput]:
        """Same as :meth:`forward_blocks`; the entry that wrappers such as DDP call."""
        return self.forward_blocks(images, block_indices, norm=norm)

    def forward_blocks(
        self, images: Tensor, block_indices: Sequence[int] | None = None, *, norm: bool = False
    ) -> list[BlockOutput]:
        """Tokens after the blocks asked for (all if None), in the order asked; ``images`` [B, C, H, W] normalised.

        Raw block outputs; ``norm=True`` applies the encoder's final norm to each (a model with none, or with its norm
        after pooling, gives raw tokens). Blocks after the deepest one asked for do not run. H and W are any multiples
        of the patch size. Raises InputError for an index out of range or an unusable image shape.
        """
        indices = self.resolve_blocks(block_indices)
        if not indices:
            return []
        _, tokens = self.run_blocks(self.embed(images), 0, max(indices) + 1, indices)
        return [self.split(self.final_norm(tokens[index]) if norm else tokens[index]) for index in indices]

    def resolve_blocks(self, block_indices: Sequence[int] | None) -> list[int]:
        """Block indices as numbers from 0 (negative ones count from the end); InputError if out of range."""
        depth = self.info.depth
        indices = range(depth) if block_indices is None else block_indices
        for index in indices:
            if not -depth <= index < depth:
                raise InputError(
                    f"block {index} is out of range: the encoder has blocks 0 to {depth - 1} (or -{depth} to -1)"
                )
        return [index % depth for index in indices]

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, P+N, D] that enter block 0, prefix tokens first, for ``images`` [B, C, H, W].

        Architectures other than a plain ViT embed inside their own forward pass; there the images pass through.
        """
        self._check_images(images)
        if not self.is_plain_vit:
            return images
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def run_blocks(
        self, tokens: Tensor, start: int, stop: int, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks ``start`` to ``stop - 1`` on the output of :meth:`embed` or of an earlier call.

        Returns the tokens [B, P+N, D] after the last of them and {block: raw tokens} for the ``wanted`` ones.
        So a frozen prefix can run under ``torch.no_grad()`` and the rest with gradients.
        """
        if not self.is_plain_vit:
            return self._run_intermediates(tokens, start, stop, wanted)
        outputs: dict[int, Tensor] = {}
        recompute = self.model.grad_checkpointing and torch.is_grad_enabled()
        for index in range(start, stop):
            block = self.model.blocks[index]
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
            if index in wanted:
                outputs[index] = tokens
        return tokens, outputs

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The encoder's final norm on ``tokens`` [B, L, D]; the tokens themselves where it has none that fits them.

        (An early stage of a hierarchical encoder is narrower than its norm.)
        """
        norm = getattr(self.model, "norm", None)
        return tokens if norm is None or tokens.shape[-1] != self.info.embed_dim else norm(tokens)

    def split(self, tokens: Tensor) -> BlockOutput:
        """Split tokens [B, P+N, D] into class token and patch tokens; register tokens are left out."""
        prefix = self.info.num_prefix_tokens
        return BlockOutput(cls=tokens[:, 0] if self.info.has_cls else None, patches=tokens[:, prefix:])

    def fixed_parameters(self, frozen_blocks: int = 0) -> Iterator[nn.Parameter]:
        """Parameters that refinement leaves alone.

        Always the position table (fixed in the published recipes) and what no block output depends on (pooling,
        its norm, classifier); with ``frozen_blocks`` > 0 also the stem and that many first blocks.
        """
        always = ("pos_embed", "fc_norm", "attn_pool", "head", "head_dist")
        for name, parameter in self.model.named_parameters():
            part, _, rest = name.partition(".")
            in_prefix = int(rest.partition(".")[0]) < frozen_blocks if part == "blocks" else part != "norm"
            if part in always or (frozen_blocks > 0 and in_prefix):
                yield parameter

    def use_math_attention(self) -> None:
        """Use plain matrix products for attention: on CPU faster than the fused kernel for short sequences."""
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    def _run_intermediates(
        self, images: Tensor, start: int, stop: int, wanted: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if stop == start:
            return images, {}
        if start != 0:
            raise InputError(f"{self.info.architecture} cannot run a part of its blocks; use it without frozen blocks")
        indices = sorted({*wanted, stop - 1})
        options: dict[str, Any] = {"indices": indices, "stop_early": True, "intermediates_only": True}
        if self.info.num_prefix_tokens:
            options["return_prefix_tokens"] = True
        try:
            intermediates = self.model.forward_intermediates(images, output_fmt="NCHW", **options)
        except AssertionError as error:  # timm's way to refuse an image size
            raise InputError(
                f"{self.info.architecture} refuses images {tuple(images.shape)} ({error}); give its own size"
            ) from error
        outputs = {index: _as_tokens(value) for index, value in zip(indices, intermediates, strict=True)}
        return outputs[stop - 1], {index: outputs[index] for index in indices if index in wanted}

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.info.in_chans:
            raise InputError(
                f"images must have shape [B, {self.info.in_chans}, H, W], got {list(images.shape)}; "
                "stack and convert them to the encoder's channels first"
            )
        check_image_size((images.shape[2], images.shape[3]), self.info.patch_size)


def _structure(model: Any) -> dict[str, Any]:
    """Width, depth, heads, patch, tokens and image size of any timm model, as far as it shows them."""
    is_plain = type(model) is VisionTransformer
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks is not None and len(blocks) else None
    patch_embed: Any = getattr(model, "patch_embed", None)
    patch = patch_embed.patch_size if is_plain else model.feature_info[-1]["reduction"]
    image = getattr(patch_embed, "img_size", None) or _default_config(model).get("input_size", (3, 224, 224))[1:]
    num_prefix = int(getattr(model, "num_prefix_tokens", 0))
    return {
        "embed_dim": int(model.num_features),
        "depth": len(model.blocks) if is_plain else len(model.feature_info),
        "num_heads": int(getattr(attention, "num_heads", 0)),
        "patch_size": (patch, patch) if isinstance(patch, int) else tuple(patch),
        "num_prefix_tokens": num_prefix,
        "has_cls": num_prefix > 0 and getattr(model, "cls_token", None) is not None,
        "image_size": tuple(image),
    }


def _default_config(model: Any) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _in_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _per_channel(given: Sequence[float] | None, imagenet: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """``given`` as floats; by default ImageNet's values, or their mean per channel where there are not three."""
    if given is not None:
        return tuple(float(value) for value in given)
    return imagenet if channels == 3 else (sum(imagenet) / 3,) * channels


def _enable_dynamic_image_size(model: Any) -> None:
    """What timm's ``dynamic_img_size=True`` sets at construction, on a model built without it."""
    if model.dynamic_img_size:
        return
    model.dynamic_img_size = True
    patch_embed = model.patch_embed
    patch_embed.strict_img_size = False
    patch_embed.flatten = False
    patch_embed.output_fmt = type(patch_embed.output_fmt)("NHWC")


def _as_tokens(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Feature map [B, D, h, w], with or without prefix tokens [B, P, D], to tokens [B, P+N, D]."""
    if isinstance(output, tuple):
        spatial, prefix = output
        return torch.cat([prefix, _as_tokens(spatial)], dim=1)
    return output.flatten(2).transpose(1, 2)
