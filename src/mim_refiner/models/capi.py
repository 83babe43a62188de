"""CAPI's Vision Transformer (Darcet et al., arXiv 2502.08769) on timm's classes.

Registers and no class token; rotary positions whose frequencies lie in every block, the registers placed along the
image's edge; RMSNorm; no biases; a final norm without parameters. Importing this module registers ``vit_capi``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from mim_refiner.models.kinds import register
from mim_refiner.models.positions import Grid

NORM_EPS = 1e-5


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
        super().__init__(*args, reg_tokens=reg_tokens, norm_layer=partial(nn.RMSNorm, eps=NORM_EPS), **kwargs)
        self.norm = nn.RMSNorm(self.embed_dim, eps=NORM_EPS, elementwise_affine=False)

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


register("vit_capi", CapiVisionTransformer)
