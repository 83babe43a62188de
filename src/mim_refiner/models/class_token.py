"""One block computed for the class token alone, where nobody reads its other tokens: a tenth of its operations or less.

A single query needs no keys and values of all tokens: with head h, token n and the normed tokens x,
q_h . (W_k x_n) = (W_k' q_h) . x_n, and the sum over n of a_n (W_v x_n) = W_v (sum over n of a_n x_n). A bias of the
keys adds one number to all logits, which the softmax takes away. Values and gradients are those of the whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from mim_refiner.models.beit import GridAttention, OwnTable, relative_bias
from mim_refiner.models.postnorm import PostNormBlock

_PRE_NORM, _POST_NORM = (Block, BeitBlock, EvaBlock), (PostNormBlock,)
_ATTENTIONS = (Attention, BeitAttention, GridAttention, EvaAttention)


def class_token_after(block: Any, tokens: Tensor, arguments: tuple[Any, ...] = ()) -> Tensor | None:
    """Class token [B, 1, D] after ``block`` on ``tokens`` [B, L, D], class token first; None for other kinds of block.

    (A block whose weights are spread over processes is of another kind: it gathers them in its own call.)
    """
    attention, post_norm = block.attn, type(block) in _POST_NORM
    if not (post_norm or type(block) in _PRE_NORM) or type(attention) not in _ATTENTIONS:
        return None
    if getattr(attention, "gate", None) is not None or attention.qkv is None:
        return None
    first = tokens[:, :1]
    attended = _attended(attention, tokens if post_norm else block.norm1(tokens), *arguments)
    if post_norm:
        first = block.norm1(first + block.drop_path1(block.ls1(attended)))
        return block.norm2(first + block.drop_path2(block.ls2(block.mlp(first))))
    first = first + block.drop_path1(_scaled(block, 1, attended))
    return first + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(first))))


def _scaled(block: Any, number: int, x: Tensor) -> Tensor:
    """Layer scale, under either of its names."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(x)
    gamma = getattr(block, f"gamma_{number}")
    return x if gamma is None else gamma * x


def _attended(attention: Any, x: Tensor, extra: Any = None) -> Tensor:
    """The attention's output [B, 1, D] for its first token; ``extra``: Beit's bias, or Eva's rotations."""
    heads = attention.num_heads
    query, key, value = attention.qkv.weight.unflatten(0, (3, heads, -1)).unbind(0)  # [K, d, D]
    query_bias, key_bias, value_bias = _biases(attention)
    q = F.linear(x[:, 0], query.flatten(0, 1), query_bias).unflatten(1, (heads, -1))  # [B, K, d]
    rotations = extra if isinstance(attention, EvaAttention) else None
    normed = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if rotations is None and all(norm is None or isinstance(norm, nn.Identity) for norm in normed):
        folded = torch.bmm(q.transpose(0, 1), key).transpose(0, 1)  # [B, K, D]
        logits = torch.bmm(folded, x.mT)
    else:
        logits = _logits_of_keys(attention, q, F.linear(x, key.flatten(0, 1), key_bias), rotations)
    logits = logits * attention.scale
    bias = None if rotations is not None else _relative_bias(attention, extra)
    weights = (logits if bias is None else logits + bias[:, :, 0]).softmax(-1)  # [B, K, L]
    weights = attention.attn_drop(weights.unsqueeze(2)).squeeze(2)
    mixed = torch.bmm(weights.to(x.dtype), x)  # [B, K, D]
    values = torch.bmm(mixed.transpose(0, 1), value.mT).transpose(0, 1)  # [B, K, d]
    if value_bias is not None:
        values = values + weights.sum(-1, keepdim=True) * value_bias.view(heads, -1)
    output = getattr(attention, "norm", nn.Identity())(values.flatten(1).unsqueeze(1))
    return attention.proj_drop(attention.proj(output))


def _logits_of_keys(attention: Any, q: Tensor, keys: Tensor, rotations: Tensor | None) -> Tensor:
    """[B, K, L] from q [B, K, d] and keys [B, L, K * d] that are normed or rotated before they meet."""
    keys = attention.k_norm(keys.unflatten(2, (attention.num_heads, -1)).transpose(1, 2))
    if rotations is not None:
        prefix = attention.num_prefix_tokens
        turned = apply_rot_embed_cat(keys[:, :, prefix:], rotations, half=getattr(attention, "rotate_half", False))
        keys = torch.cat([keys[:, :, :prefix], turned], dim=2).type_as(q)
    return torch.matmul(attention.q_norm(q).unsqueeze(2), keys.mT).squeeze(2)


def _biases(attention: Any) -> Sequence[Tensor | None]:
    """Of queries, keys and values."""
    if isinstance(attention, Attention):
        return (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    return attention.q_bias, attention.k_bias, attention.v_bias


def _relative_bias(attention: Any, extra: Tensor | OwnTable | None) -> Tensor | None:
    """Beit's bias [1, K, L, L]; None where there is none."""
    if not isinstance(attention, BeitAttention):
        return None
    if isinstance(extra, OwnTable):
        return relative_bias(attention.relative_position_bias_table, tuple(attention.window_size), *extra)
    return extra
