"""timm's plain ViT with what no argument of timm's says. Importing this module registers ``vit_variant`` with timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mim_refiner.errors import InputError
from mim_refiner.models.registration import register


class VariantVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """``patch_padding``: pixels that the patch projection adds around the image (ViTPose).

    ``block_heads``: the number of attention heads of every block (TinyMIM). Other arguments as timm's. Raises
    InputError for numbers of heads that do not fit blocks or width.
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


register("vit_variant", VariantVisionTransformer)
