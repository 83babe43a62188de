"""The dense anchor: patches of an image shall stay as alike to each other as in the encoder of the START.

Contrastive training on one feature an image may cost what its patches tell apart. Gram anchoring (DINOv3, arXiv
2508.10104) holds the matrix of cosines between an image's patch tokens to that of a frozen encoder, and leaves the
tokens themselves free to move.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner.models.backbone import Backbone


class DenseAnchor(nn.Module):
    """The encoder of the START, frozen, and the blocks whose patches are compared."""

    def __init__(self, backbone: Backbone, blocks: Sequence[int]) -> None:
        super().__init__()
        self.start = copy.deepcopy(backbone).requires_grad_(False)
        self.blocks = sorted(backbone.resolve_blocks(blocks))
        self.train(False)

    def train(self, mode: bool = True) -> DenseAnchor:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    def forward(self, backbone: Backbone, tokens: Tensor, first: int) -> Tensor:
        """Distance of ``backbone`` from the START, from the ``tokens`` [B, P+N, D] that enter block ``first`` (or the
        images, where it is the stem that is trained: 0), mean over images and blocks.
        """
        own = self._patches(backbone, tokens, first)
        with torch.no_grad():
            start = self._patches(self.start, tokens, first)
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 has too few digits for cosines
            return torch.stack([gram_distance(x, y) for x, y in zip(own, start, strict=True)]).mean()

    def _patches(self, backbone: Backbone, tokens: Tensor, first: int) -> list[Tensor]:
        """Patch tokens [B, N, D] after each block, the last one's after the final norm as for the heads."""
        tokens = tokens if first else backbone.embed(tokens)
        _, outputs = backbone.run_blocks(tokens, first, self.blocks[-1] + 1, self.blocks)
        last = backbone.info.depth - 1
        if last in outputs:
            outputs[last] = backbone.final_norm(outputs[last])
        return [backbone.split(outputs[block]).patches for block in self.blocks]


def gram_distance(patches: Tensor, start: Tensor) -> Tensor:
    """Mean over images and pairs of patches of the squared difference of their cosines, of [B, N, D] and [B, N, D']."""
    own, theirs = (F.normalize(x.float() if x.dtype != torch.float64 else x, dim=-1) for x in (patches, start))
    return (own @ own.mT - theirs @ theirs.mT).square().mean()
