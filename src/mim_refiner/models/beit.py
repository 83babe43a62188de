"""timm's Beit at any image size: the attention takes its table of relative positions for the grid it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.models.beit import Attention, Beit, gen_relative_position_index
from torch import Tensor

from mim_refiner.models.positions import Grid, made_once, resize_relative


class OwnTable(NamedTuple):
    """Stands for the shared bias in a call of a block whose attention has a table of its own."""

    grid: Grid
    rule: str


class GridAttention(Attention):  # type: ignore[misc]
    """timm's attention; with :class:`OwnTable` in place of the shared bias it uses its own table for that grid."""

    _wanted: OwnTable | None = None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | OwnTable | None = None) -> Tensor:
        # Set anew in every call, so that a recomputed block sees the grid of its own images.
        own = isinstance(shared_rel_pos_bias, OwnTable)
        self._wanted = shared_rel_pos_bias if own else None  # type: ignore[assignment]
        return super().forward(x, shared_rel_pos_bias=None if own else shared_rel_pos_bias)

    def _get_rel_pos_bias(self) -> Tensor:
        if self._wanted is None:
            return super()._get_rel_pos_bias()
        return relative_bias(self.relative_position_bias_table, tuple(self.window_size), *self._wanted)


def enable_any_grid(model: Any) -> None:
    """Let a built timm Beit take other image sizes; its tensors and its outputs at the native size do not change."""
    model.patch_embed.strict_img_size = False
    for block in model.blocks:
        if type(block.attn) is Attention:
            block.attn.__class__ = GridAttention


def shared_bias(model: Beit, grid: Grid, rule: str) -> Tensor | OwnTable | None:
    """What each block of ``model`` is called with beside the tokens."""
    if model.rel_pos_bias is not None:
        native = tuple(model.rel_pos_bias.window_size)
        return relative_bias(model.rel_pos_bias.relative_position_bias_table, native, grid, rule)
    return OwnTable(grid, rule) if model.blocks[0].attn.relative_position_bias_table is not None else None


def relative_bias(table: Tensor, native: Grid, grid: Grid, rule: str) -> Tensor:
    """Bias of the attention [1, K, 1+N, 1+N] for ``grid`` from the table of grid ``native``."""
    index = _index(table, grid)
    bias = resize_relative(table, native, grid, rule=rule)[index.flatten()]
    return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


@made_once
def _index(grid: Grid) -> Tensor:
    index: Tensor = gen_relative_position_index(grid)
    return index
