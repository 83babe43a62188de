"""Blocks that keep less of their forward pass and compute the rest again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

# What "selective" keeps the outputs of. The rest (norms, GELU, softmax, sums) costs next to nothing to make again.
_DEAR = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
]  # fmt: skip
_selective = partial(create_selective_checkpoint_contexts, _DEAR)


def checkpointed(block: Any, tokens: Tensor, *arguments: Any, selective: bool) -> Tensor:
    """``block(tokens, *arguments)``; it keeps its inputs, and where ``selective`` outputs of products and attention."""
    run, contexts = (partial(_uncached, block), _selective) if selective else (block, noop_context_fn)
    output: Tensor = checkpoint(run, tokens, *arguments, use_reentrant=False, context_fn=contexts)
    return output


def _uncached(block: Any, tokens: Tensor, *arguments: Any) -> Tensor:
    """The block with casts of its own of the weights: both passes are to run the same operations."""
    kind = tokens.device.type
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        output: Tensor = block(tokens, *arguments)
    return output
