"""Kinds of ViT that timm has not, on its classes, and made known to it so that they are built by name as its own.

Importing this module registers ``vit_postnorm``, ``vit_variant`` and ``vit_capi``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from mim_refiner.errors import InputError
from mim_refiner.models.positions import Grid
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD
from mim_refiner.reporting import number_of

default_cfgs: dict[str, Any] = {}  # timm looks here for what it knows of a name


def _register(name: str, kind: type) -> None:
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
                f"{number_of(len(self.blocks), 'blocks')}"
            )
        for block, heads in zip(self.blocks, block_heads, strict=True):
            block.attn.num_heads, block.attn.head_dim = heads, self.embed_dim // heads
            block.attn.scale = block.attn.head_dim**-0.5


# --- CAPI (Darcet et al., arXiv 2502.08769): registers and no class token; rotary positions whose frequencies lie in
# every block, the registers placed along the image's edge; RMSNorm; no biases; a final norm without parameters.

_CAPI_EPS = 1e-5


class RotaryAttention(Attention):  # type: ignore[misc]
    """timm's attention with queries and keys rotated by position x frequency; ``freqs`` [2, head width]."""

    def __init__(self, dim: int, num_heads: int = 8, **kwargs: Any) -> None:
        super().__init__(dim, num_heads=num_heads, **kwargs)
        self.freqs = nn.Parameter(_frequencies(dim // num_heads))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        angles = positions.to(self.freqs) @ self.freqs
        query, key = (_rotate(part, angles).to(qkv.dtype) for part in (qkv[0], qkv[1]))
        attended = F.scaled_dot_product_attention(query, key, qkv[2])
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return projected


class RotaryBlock(Block):  # type: ignore[misc]
    """timm's pre-norm block whose attention takes ``positions`` [P+N, 2]."""

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.attn = RotaryAttention(dim, num_heads, qkv_bias=False, proj_bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), positions)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class CapiVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """timm's ViT of rotary blocks. ``reg_tokens`` must be a multiple of 4; other arguments as timm's."""

    def __init__(self, *args: Any, reg_tokens: int = 16, **kwargs: Any) -> None:
        kwargs |= {"block_fn": RotaryBlock, "qkv_bias": False, "proj_bias": False}
        kwargs |= {"class_token": False, "pos_embed": "none", "global_pool": "avg", "fc_norm": False}
        super().__init__(*args, reg_tokens=reg_tokens, norm_layer=partial(nn.RMSNorm, eps=_CAPI_EPS), **kwargs)
        self.norm = nn.RMSNorm(self.embed_dim, eps=_CAPI_EPS, elementwise_affine=False)

    def forward_features(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Tokens [B, P+N, D] after the final norm, for images [B, C, H, W] of any multiple of the patch size."""
        height, width = x.shape[-2:]
        rows, columns = self.patch_embed.dynamic_feat_size((height, width))
        x = self._pos_embed(self.patch_embed(x))
        positions = token_positions((rows, columns), self.num_reg_tokens, x.device)
        for block in self.blocks:
            x = block(x, positions)
        normed: Tensor = self.norm(x)
        return normed


def token_positions(grid: Grid, num_registers: int, device: torch.device) -> Tensor:
    """(row, column) of every token on the scale 0 to 1: registers clockwise along the edge, then the patches."""
    rows, columns = (torch.linspace(0, 1, side, device=device) for side in grid)
    patches = torch.cartesian_prod(rows, columns)
    steps = torch.arange(num_registers // 4, device=device) / max(num_registers // 4, 1)
    zero, one = torch.zeros_like(steps), torch.ones_like(steps)
    sides = [(steps, zero), (one, steps), (1 - steps, one), (zero, 1 - steps)]
    edge = torch.cat([torch.stack(side, dim=1) for side in sides])
    low, high = patches.amin(0), patches.amax(0)  # a single row or column has no extent
    return torch.cat([low + edge * (high - low), patches])


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _frequencies(head_width: int) -> Tensor:
    """Initial frequencies, 7 to 7e-4 turns an image, in radians: half of the channels by row, half by column."""
    steps = 7.0 * 1e4 ** torch.linspace(0, -1, head_width // 4)
    both = torch.zeros(2, head_width)
    both[0, : head_width // 2] = both[1, head_width // 2 :] = torch.cat([steps, steps])
    return both * 2 * torch.pi


for _name, _kind in (
    ("vit_postnorm", PostNormVisionTransformer),
    ("vit_variant", VariantVisionTransformer),
    ("vit_capi", CapiVisionTransformer),
):
    _register(_name, _kind)
