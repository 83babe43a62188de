"""Masked-autoencoder pre-training model around a plain timm ViT (He et al., "Masked Autoencoders Are Scalable Vision
Learners", arXiv 2111.06377; public code github.com/facebookresearch/mae). Written anew; checked against golden vectors.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mim_refiner.core.run import send
from mim_refiner.errors import InputError


class MAEOutput(NamedTuple):
    loss: Tensor  # scalar, mean squared error of normalised pixels over masked patches
    prediction: Tensor  # [B, N, patch_h * patch_w * C]
    mask: Tensor  # [B, N], 1 = hidden from the encoder


def sincos_position_table(dim: int, grid_height: int, grid_width: int, num_prefix: int) -> Tensor:
    """Fixed 2-d sine-cosine positions [1, num_prefix + N, dim], zero for prefix tokens.

    The first half of the channels encodes the column and the second half the row, as in the MAE files.
    Raises InputError if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise InputError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}; choose another width")
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(positions: Tensor) -> Tensor:
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows = torch.arange(grid_height, dtype=torch.float64).repeat_interleave(grid_width)
    columns = torch.arange(grid_width, dtype=torch.float64).repeat(grid_height)
    table = torch.cat([encode(columns), encode(rows)], dim=1)
    return torch.cat([torch.zeros(num_prefix, dim, dtype=torch.float64), table]).float()[None]


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, N, patch_h * patch_w * C], patches row by row, channels last within a pixel."""
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    grid = images.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // ph) * (width // pw), ph * pw * channels)


class MaskedAutoencoder(nn.Module):
    """A timm ViT that sees a random quarter of the patches, and a light decoder (MAE's names) that tells the rest."""

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        if decoder_dim % decoder_heads:
            raise InputError(
                f"decoder_dim {decoder_dim} is not a multiple of decoder_heads {decoder_heads}; change one"
            )
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.patch_size: tuple[int, int] = tuple(encoder.patch_embed.patch_size)
        grid_height, grid_width = encoder.patch_embed.grid_size
        self.num_prefix_tokens: int = encoder.num_prefix_tokens
        in_chans: int = encoder.patch_embed.proj.in_channels

        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = sincos_position_table(decoder_dim, grid_height, grid_width, self.num_prefix_tokens)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size[0] * self.patch_size[1] * in_chans)

    def initialize(self, *, encoder: bool = True) -> MaskedAutoencoder:
        """Initialise as MAE does, with fixed sine-cosine positions; the decoder alone when ``encoder`` is False."""
        kept = set() if encoder else set(self.encoder.modules())
        for module in self.modules():
            if module in kept:
                continue
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if not encoder:
            nn.init.normal_(self.mask_token, std=0.02)
            return self
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        for token in (self.mask_token, self.encoder.cls_token, self.encoder.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        table = self.encoder.pos_embed
        rows, columns = self.encoder.patch_embed.grid_size
        prefix = table.shape[1] - rows * columns
        with torch.no_grad():
            table.copy_(sincos_position_table(table.shape[2], rows, columns, prefix))
        table.requires_grad_(False)
        return self

    def forward(
        self, images: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> MAEOutput:
        """Masked prediction of normalised pixels for ``images`` [B, C, H, W] (already normalised).

        ``noise`` [B, N] decides the mask (the smallest values stay visible); drawn from ``generator`` if not given.
        """
        patches = self.encoder.patch_embed(images)
        patches = patches.flatten(1, 2) if patches.ndim == 4 else patches  # timm keeps the grid for dynamic sizes
        patches = patches + self.encoder.pos_embed[:, -patches.shape[1] :]
        batch, count, _ = patches.shape
        if noise is None:
            noise = send([torch.rand(batch, count, generator=generator)], patches.device)[0]
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        visible = order[:, : int(count * (1 - self.mask_ratio))]
        mask = torch.ones(batch, count, device=patches.device).scatter_(1, visible, 0.0)
        latent = self._encode(patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2])))
        prediction = self._decode(latent, restore)
        target = patchify(images, self.patch_size)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(-1)
        return MAEOutput((error * mask).sum() / mask.sum(), prediction, mask)

    def _encode(self, patches: Tensor) -> Tensor:
        encoder = self.encoder
        prefix: list[Tensor] = []
        if encoder.cls_token is not None:
            position = 0.0 if encoder.no_embed_class else encoder.pos_embed[:, :1]
            prefix.append(encoder.cls_token + position)
        if encoder.reg_token is not None:
            prefix.append(encoder.reg_token)
        tokens = torch.cat([token.expand(len(patches), -1, -1) for token in prefix] + [patches], dim=1)
        tokens = encoder.norm_pre(tokens)
        for block in encoder.blocks:
            tokens = block(tokens)
        return encoder.norm(tokens)

    def _decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        tokens = self.decoder_embed(latent)
        prefix, visible = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), restore.shape[1] - visible.shape[1], -1)
        patches = torch.cat([visible, hidden], dim=1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([prefix, patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, self.num_prefix_tokens :]
