"""Random layers whose draws do not depend on how a batch is cut into micro-batches or over processes.

They draw for the whole batch from torch's global generator and use the rows that core.collectives names. So a
micro-batch that starts from the same generator state as the whole batch sees exactly the same masks.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports its machinery at once
from torch.nn.modules.batchnorm import _BatchNorm

from mim_refiner.core.collectives import Rows, current_rows
from mim_refiner.core.device import hashed


class RowDropPath(DropPath):  # type: ignore[misc]
    """timm's stochastic depth; on a part of a batch it drops what it would drop there of the whole batch."""

    @_disable_dynamo  # a compiled graph draws in its own way, and with a graph otherwise than without
    def forward(self, x: Tensor) -> Tensor:
        rows = current_rows()
        if rows is None or rows.whole or not self.training or self.drop_prob == 0:
            return super().forward(x)
        keep = 1 - self.drop_prob
        shape = (len(x) // rows.count * rows.total,) + (1,) * (x.ndim - 1)
        mask = rows.take(x.new_empty(shape).bernoulli_(keep))
        if keep > 0 and self.scale_by_keep:
            mask = mask.div(keep)
        return x * mask


class RowDropout(nn.Dropout):
    """Dropout of single values by a hash of their place and of a number drawn for their row.

    So the mask of the whole batch need never exist. 2.6 times as slow as torch's, with int64 numbers beside the
    values; ViTs of this package's kind have no active dropout.
    """

    @_disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        rows = current_rows() or Rows(0, len(x), len(x))
        of_rows = rows.take(torch.randint(2**31, (len(x) // rows.count * rows.total,), device=x.device))
        drawn = hashed(hashed(of_rows)[:, None] ^ hashed(torch.arange(x[0].numel(), device=x.device)))
        return x * (drawn >= int(self.p * 2**32)).view_as(x) / (1 - self.p or 1)  # p = 1 drops all, as torch's


def draw_by_row(model: nn.Module) -> None:
    """Replace drop-path and active dropout inside ``model``; neither has parameters, so state dicts stay the same."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is DropPath:
                setattr(module, name, RowDropPath(child.drop_prob, child.scale_by_keep))
            elif type(child) is nn.Dropout and child.p > 0:
                setattr(module, name, RowDropout(child.p))
                if name == "attn_drop" and hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]  # the fused kernel draws by itself


def batch_dependent_layer(model: nn.Module) -> str | None:
    """Name of the first layer that mixes the images of a batch (or draws in a way that cannot be replayed by row)."""
    for name, module in model.named_modules():
        if isinstance(module, PatchDropout) and module.prob > 0:
            return f"{name} ({type(module).__name__})"
    return batch_norm_layer(model)


def batch_norm_layer(model: nn.Module) -> str | None:
    """Name of the first BatchNorm, whose running statistics a second pass over the same images would move again."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            return f"{name} ({type(module).__name__})"
    return None
