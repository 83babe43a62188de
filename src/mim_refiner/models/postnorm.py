"""The post-norm Vision Transformer of data2vec 2.0 (arXiv 2212.07525) on timm's classes.

Each block normalises after adding: x = norm1(x + attn(x)), x = norm2(x + mlp(x)). A norm follows the embedding, none
the last block. Importing this module registers ``vit_postnorm`` with timm.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mim_refiner.models.registration import register


class PostNormBlock(Block):  # type: ignore[misc]
    """timm's block with the norms after the additions."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, *args, **kwargs))))
        x = self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))
        return x


class PostNormVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """timm's ViT of post-norm blocks; ``norm_pre`` is the norm after the embedding.

    Arguments as timm's; ``pre_norm`` and ``final_norm`` follow from the kind of block and are ignored.
    """

    def __init__(self, *args: Any, pre_norm: bool = True, final_norm: bool = False, **kwargs: Any) -> None:
        kwargs |= {"block_fn": PostNormBlock, "fc_norm": False}
        # timm leaves out the projection's bias with pre_norm, so the norm is put in afterwards.
        super().__init__(*args, pre_norm=False, final_norm=True, **kwargs)
        parts: Any = self
        parts.norm_pre, parts.norm = parts.norm, nn.Identity()


register("vit_postnorm", PostNormVisionTransformer)
