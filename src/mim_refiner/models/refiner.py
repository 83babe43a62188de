"""The model of refinement: an encoder and one contrastive head on each of several late blocks (paper section 3.3)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadConfig, HeadOutput, Objective, RefinerHead, draw_choices, run_heads
from mim_refiner.models.lora import fixed_beside_lora
from mim_refiner.models.stochastic import draw_by_row


class RefinerOutput(NamedTuple):
    loss: Tensor  # sum over heads
    heads: dict[int, HeadOutput]  # by block index


class Refiner(nn.Module):
    """Encoder plus heads; ``heads`` is keyed by block index.

    A head reads the pooled raw output of its block; only the head on the last block sees it after the final norm.
    ``objective`` and ``pooling`` are one for all heads, or one for each in the order of the sorted blocks.
    Raises InputError for blocks the encoder does not have or a pooling it cannot give.
    """

    def __init__(
        self,
        backbone: Backbone,
        blocks: Sequence[int],
        config: HeadConfig,
        objective: Objective | Sequence[Objective] | None = None,
        *,
        pooling: str | Sequence[str],
        frozen_blocks: int = 0,
    ) -> None:
        super().__init__()
        depth = backbone.info.depth
        wrong = [block for block in blocks if not 0 <= block < depth]
        if wrong or not blocks:
            raise InputError(f"heads.blocks {list(blocks)}: the encoder has blocks 0 to {depth - 1}; choose among them")
        self.blocks = sorted(set(blocks))
        poolings = [pooling] * len(self.blocks) if isinstance(pooling, str) else pooling
        objective = objective or Objective()
        objectives = [objective] * len(self.blocks) if isinstance(objective, Objective) else objective
        if "cls" in poolings and not backbone.info.has_cls:
            raise InputError("heads.pooling 'cls': this encoder has no class token; use heads.pooling=mean")
        if not 0 <= frozen_blocks <= min(blocks):
            raise InputError(
                f"frozen_blocks {frozen_blocks}: must be between 0 and the first head's block {min(blocks)}"
            )
        draw_by_row(backbone)
        self.backbone = backbone
        self.poolings = dict(zip(self.blocks, poolings, strict=True))
        self.frozen_blocks = frozen_blocks
        self.heads = nn.ModuleDict(
            {
                str(block): RefinerHead(backbone.block_dims[block], config, own)
                for block, own in zip(self.blocks, objectives, strict=True)
            }
        )
        self.encoder_frozen = False
        self.anchor: DenseAnchor | None = None

    def freeze_encoder(self) -> None:
        """Head warm-up: the encoder is in eval mode and keeps no gradient."""
        self.encoder_frozen = True
        self.backbone.requires_grad_(False)
        self.train()

    def unfreeze_encoder(self) -> None:
        """Refinement: all but the frozen prefix and the fixed position table trains, or the adapters alone."""
        self.encoder_frozen = False
        self.backbone.requires_grad_(True)
        for parameter in self.fixed_parameters():
            parameter.requires_grad_(False)
        self.train()

    def fixed_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the encoder that refinement leaves alone."""
        yield from self.backbone.fixed_parameters(self.frozen_blocks)
        yield from fixed_beside_lora(self.backbone)

    def set_top_k(self, top_k: int) -> None:
        for head in self.heads.values():
            head.queue.top_k = top_k  # type: ignore[union-attr]

    def train(self, mode: bool = True) -> Refiner:
        super().train(mode)
        if self.encoder_frozen:
            self.backbone.eval()
        return self

    def view_groups(self, views: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the views of equal size; each group passes through the encoder as one batch."""
        by_size: dict[torch.Size, list[int]] = {}
        for index, view in enumerate(views):
            by_size.setdefault(view.shape, []).append(index)
        return list(by_size.values())

    def features(self, views: Sequence[Tensor]) -> dict[int, Tensor]:
        """Pooled input of every head, {block: [V, B, D]}, for ``views`` of [B, C, h, w] (normalised)."""
        pooled: dict[int, dict[int, Tensor]] = {block: {} for block in self.blocks}
        with torch.no_grad() if self.encoder_frozen else nullcontext():
            for group in self.view_groups(views):
                images = torch.cat([views[index] for index in group])
                for block, output in self.pooled_blocks(self.frozen_prefix(images)).items():
                    pooled[block].update(zip(group, output.chunk(len(group)), strict=True))
        return {block: torch.stack([by_view[v] for v in range(len(views))]) for block, by_view in pooled.items()}

    @property
    def feature_widths(self) -> list[int]:
        return [self.backbone.block_dims[block] for block in self.blocks]

    @torch.no_grad()
    def frozen_features(self, views: Sequence[Tensor]) -> list[Tensor]:
        """What can stand in the place of each view [B, C, h, w] as long as the frozen part stays as it is.

        Tokens after the frozen blocks [B, P+N, D]; where none is frozen the inputs of all heads, one behind the other
        [B, sum of D], which the warm-up alone can use.
        """
        found: dict[int, Tensor] = {}
        for group in self.view_groups(views):
            output = self.frozen_prefix(torch.cat([views[index] for index in group]))
            if not self.frozen_blocks:
                output = torch.cat(list(self.pooled_blocks(output).values()), dim=1)
            found |= dict(zip(group, output.chunk(len(group)), strict=True))
        return [found[index] for index in range(len(views))]

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """Tokens [B, P+N, D] after the frozen blocks, without graph; the images themselves where none is frozen.

        What :meth:`frozen_features` gave stays as it is, here and in :meth:`pooled_blocks`.
        """
        if not self.frozen_blocks or images.ndim < 4:
            return images
        with torch.no_grad():
            tokens, _ = self.backbone.run_blocks(self.backbone.embed(images), 0, self.frozen_blocks)
        return tokens

    def pooled_blocks(self, prefix: Tensor) -> dict[int, Tensor]:
        """Pooled outputs {block: [B, D]} of the head blocks, from what :meth:`frozen_prefix` gave."""
        if prefix.ndim == 2:
            return dict(zip(self.blocks, prefix.split(self.feature_widths, dim=1), strict=True))
        alone = self.poolings[self.blocks[-1]] == "cls"
        outputs = _block_tokens(self.backbone, prefix, self.frozen_blocks, self.blocks, class_token_last=alone)
        return {block: self._pooled(tokens, self.poolings[block]) for block, tokens in outputs.items()}

    def _pooled(self, tokens: Tensor, pooling: str) -> Tensor:
        """[B, D]; of "cls+mean" both, one behind the other."""
        prefix = self.backbone.info.num_prefix_tokens
        parts = [tokens[:, 0] if each == "cls" else tokens[:, prefix:].mean(1) for each in pooling.split("+")]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def head_losses(
        self,
        features: Mapping[int, Tensor],
        sample_ids: Tensor,
        *,
        generator: torch.Generator | None = None,
        choices: Mapping[int, Tensor] | None = None,
    ) -> RefinerOutput:
        """Loss over all heads from their pooled inputs ``features`` {block: [V, B, D]}, global views first.

        ``sample_ids`` [B]; ``choices`` {block: [G*B]} replays the draws among the nearest neighbours.
        """
        choices = self.draw_choices(sample_ids, generator) if choices is None else choices
        alike: dict[tuple[int, Objective], list[int]] = {}  # blocks whose heads run together
        for block, inputs in features.items():
            alike.setdefault((inputs.shape[-1], self.head(block).objective), []).append(block)
        outputs: dict[int, HeadOutput] = {}
        for blocks in alike.values():
            own = [choices[block] for block in blocks] if choices else None
            stacked = torch.stack([features[block] for block in blocks])
            found = run_heads([self.head(block) for block in blocks], stacked, sample_ids, own)
            outputs |= dict(zip(blocks, found, strict=True))
        return RefinerOutput(torch.stack([outputs[b].loss for b in features]).sum(), {b: outputs[b] for b in features})

    def draw_choices(self, sample_ids: Tensor, generator: torch.Generator | None) -> dict[int, Tensor]:
        """Which of their nearest neighbours the targets of every block take, {block: [G*B, 1]}, drawn for all at once
        so that they travel together; empty where there is no choice.
        """
        heads = [self.head(block) for block in self.blocks]
        num_global, device = heads[0].objective.num_global, sample_ids.device
        drawn = draw_choices(heads, num_global, len(sample_ids), generator, device)
        return {} if drawn is None else dict(zip(self.blocks, drawn, strict=True))

    def head(self, block: int) -> RefinerHead:
        """The head on a block's output."""
        head = self.heads[str(block)]
        assert isinstance(head, RefinerHead)
        return head


# --- the dense anchor: patches of an image shall stay as alike to each other as in the encoder of the START.
# Contrastive training on one feature an image may cost what its patches tell apart. Gram anchoring (DINOv3, arXiv
# 2508.10104) holds the matrix of cosines between an image's patch tokens to that of a frozen encoder, and leaves the
# tokens themselves free to move.


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
        own = _block_tokens(backbone, tokens, first, self.blocks)
        with torch.no_grad():
            start = _block_tokens(self.start, tokens, first, self.blocks)
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 has too few digits for cosines
            pairs = [[backbone.split(tokens[block]).patches for tokens in (own, start)] for block in self.blocks]
            return torch.stack([gram_distance(*pair) for pair in pairs]).mean()


def _block_tokens(backbone: Backbone, tokens: Tensor, first: int, blocks: list[int], **how: Any) -> dict[int, Tensor]:
    """Tokens [B, P+N, D] after each of the sorted ``blocks``, the encoder's last one's after the final norm.

    ``tokens`` are those that enter block ``first``, the images where that is 0; ``how``: as of ``run_blocks``.
    """
    tokens = tokens if first else backbone.embed(tokens)
    _, outputs = backbone.run_blocks(tokens, first, blocks[-1] + 1, blocks, **how)
    last = backbone.info.depth - 1
    if last in outputs:
        outputs[last] = backbone.final_norm(outputs[last])
    return outputs


def gram_distance(patches: Tensor, start: Tensor) -> Tensor:
    """Mean over images and pairs of patches of the squared difference of their cosines, of [B, N, D] and [B, N, D']."""
    own, theirs = (F.normalize(x.float() if x.dtype != torch.float64 else x, dim=-1) for x in (patches, start))
    return (own @ own.mT - theirs @ theirs.mT).square().mean()
