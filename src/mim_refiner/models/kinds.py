"""Kinds of ViT that timm has not, on its classes, and made known to it so that they are built by name as its own.

Importing this module registers ``vit_postnorm`` and ``vit_variant``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mim_refiner.errors import InputError
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["PostNormBlock", "PostNormVisionTransformer", "VariantVisionTransformer", "register"]

default_cfgs: dict[str, Any] = {}  # timm looks here for what it knows of a name


def register(name: str, kind: type) -> None:
    """``timm.create_model(name, ...)`` builds a ``kind``; its size by timm's arguments (embed_dim, depth, ...)."""

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        return build_model_with_cfg(kind, name, pretrained, **kwargs)

    about = {"input_size": (3, 224, 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic",
             "first_conv": "patch_embed.proj", "classifier": "head"}  # fmt: skip
    default_cfgs.update(generate_default_cfgs({f"{name}.untrained": about}))
    build.__name__ = name
    register_model(build)


class PostNormBlock(Block):  # type: ignore[misc]
    """timm's block with the norms after the additions: x = norm1(x + attn(x)), x = norm2(x + mlp(x))."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, *args, **kwargs))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


class PostNormVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """The ViT of data2vec 2.0 (arXiv 2212.07525): post-norm blocks, a norm after the embedding, none at the end.

    Arguments as timm's; ``pre_norm`` and ``final_norm`` follow from the kind of block and are ignored. ``norm_pre`` is
    the norm after the embedding.
    """

    def __init__(self, *args: Any, pre_norm: bool = True, final_norm: bool = False, **kwargs: Any) -> None:
        kwargs |= {"block_fn": PostNormBlock, "fc_norm": False}
        # timm leaves out the projection's bias with pre_norm, so the norm is put in afterwards.
        super().__init__(*args, pre_norm=False, final_norm=True, **kwargs)
        parts: Any = self
        parts.norm_pre, parts.norm = parts.norm, nn.Identity()


class VariantVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """timm's plain ViT with what no argument of timm's says.

    ``patch_padding``: pixels that the patch projection adds around the image (ViTPose). ``block_heads``: the number of
    attention heads of every block (TinyMIM). Other arguments as timm's. Raises InputError for numbers of heads that do
    not fit blocks or width.
    """

    def __init__(
        self, *args: Any, patch_padding: int = 0, block_heads: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.patch_embed.proj.padding = (patch_padding, patch_padding)
        if block_heads is None:
            return
        if len(block_heads) != len(self.blocks) or any(heads < 1 or self.embed_dim % heads for heads in block_heads):
            raise InputError(
                f"block_heads {list(block_heads)}: give one divisor of the width {self.embed_dim} for each of the "
                f"{len(self.blocks)} blocks"
            )
        for block, heads in zip(self.blocks, block_heads, strict=True):
            block.attn.num_heads, block.attn.head_dim = heads, self.embed_dim // heads
            block.attn.scale = block.attn.head_dim**-0.5


register("vit_postnorm", PostNormVisionTransformer)
register("vit_variant", VariantVisionTransformer)
