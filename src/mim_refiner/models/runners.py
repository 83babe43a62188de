"""How each kind of timm model turns images into tokens and runs a single block.

A runner holds no state; it is what the kinds differ in, apart from :class:`Backbone`, which is what they share.

Where nobody reads the other tokens, a block is computed for the class token alone, by a tenth of its operations or
less. A single query needs no keys and values of all tokens: with head h, token n and the normed tokens x,
q_h . (W_k x_n) = (W_k' q_h) . x_n, and the sum over n of a_n (W_v x_n) = W_v (sum over n of a_n x_n). A bias of the
keys adds one number to all logits, which the softmax takes away. Values and gradients are those of the whole block.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, resample_abs_pos_embed
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from mim_refiner.errors import InputError
from mim_refiner.models.kinds import (
    CapiVisionTransformer,
    PostNormBlock,
    PostNormVisionTransformer,
    VariantVisionTransformer,
    token_positions,
)
from mim_refiner.models.positions import Grid, made_once, resize_absolute, resize_relative
from mim_refiner.models.vit import architecture_name, registered_name

Extras = Sequence[tuple[Any, ...]]  # what each block takes after the tokens


class PlainRunner:
    """timm's VisionTransformer: class token, registers, one table of positions."""

    def prepare(self, model: Any) -> None:
        """What timm's ``dynamic_img_size=True`` sets at construction, on a model built without it."""
        if model.dynamic_img_size:
            return
        model.dynamic_img_size = True
        patch_embed = model.patch_embed
        patch_embed.strict_img_size = False
        patch_embed.flatten = False
        patch_embed.output_fmt = type(patch_embed.output_fmt)("NHWC")

    def embed(self, model: Any, images: Tensor, rule: str) -> Tensor:
        """Tokens [B, P+N, D] that enter block 0, for images [B, C, H, W]."""
        patch_embed, tokens = model.patch_embed, model.patch_embed(images)
        grid = patch_embed.dynamic_feat_size(images.shape[-2:])
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        given = (model.cls_token, getattr(model, "reg_token", None))
        prefix = [token.expand(tokens.shape[0], -1, -1) for token in given if token is not None]
        patches_only = getattr(model, "no_embed_class", False)  # the table has entries for patches alone
        if not patches_only:
            tokens = torch.cat([*prefix, tokens], dim=1)
        if model.pos_embed is not None:
            native, num_prefix = tuple(patch_embed.grid_size), 0 if patches_only else model.num_prefix_tokens
            tokens = tokens + resize_absolute(model.pos_embed, native, grid, num_prefix=num_prefix, rule=rule)
        if patches_only:
            tokens = torch.cat([*prefix, tokens], dim=1)
        tokens = model.pos_drop(tokens)
        for layer in (getattr(model, name, None) for name in ("patch_drop", "norm_pre")):
            tokens = tokens if layer is None else layer(tokens)
        return tokens

    def extras(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Extras:
        """Arguments of every block after the tokens; built once a call."""
        return [()] * len(model.blocks)


class RotaryRunner(PlainRunner):
    """CAPI: positions instead of a table."""

    def extras(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Extras:
        return [(token_positions(grid, model.num_reg_tokens, device),)] * len(model.blocks)


class BeitRunner(PlainRunner):
    """timm's Beit: a bias of relative positions, shared or in every block, beside or instead of the table."""

    def prepare(self, model: Any) -> None:
        model.patch_embed.strict_img_size = False
        for block in model.blocks:
            if type(block.attn) is BeitAttention:
                block.attn.__class__ = GridAttention

    def extras(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Extras:
        bias: Tensor | OwnTable | None = None
        if (shared := model.rel_pos_bias) is not None:
            bias = relative_bias(shared.relative_position_bias_table, tuple(shared.window_size), grid, rule)
        elif model.blocks[0].attn.relative_position_bias_table is not None:
            bias = OwnTable(grid, rule)
        return [(bias,)] * len(model.blocks)


class EvaRunner(PlainRunner):
    """timm's Eva (EVA, EVA-02): a table of positions and rotary embeddings of the patches."""

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        if getattr(model.rope, "_use_cached_embed", False) and hasattr(model.rope, "bands"):
            model.rope._use_cached_embed = False  # computed for the grid asked for, not kept for one

    def extras(self, model: Any, grid: Grid, rule: str, device: torch.device) -> Extras:
        rope, shape, known = model.rope, list(grid), None
        if rope is not None and model.rope_mixed:  # learned, an embedding for each block
            if hasattr(rope, "update_feat_shape"):
                rope.update_feat_shape(shape)  # of kinds that keep the embedding of one grid
            return [(embedding,) for embedding in rope.get_embed(shape=shape)]
        if rope is not None and rope.training and getattr(rope, "aug_active", False):
            known = rope.get_embed(shape=shape)
        elif rope is not None:
            frequencies = next(rope.buffers())
            kept, key = rope.__dict__.setdefault("_known", {}), (grid, frequencies.device, frequencies.dtype)
            if key not in kept:  # timm makes it on the host, which would wait for the copy at every step
                with torch.inference_mode(False):
                    kept[key] = rope.get_embed(shape=shape)
            known = kept[key]
        return [(known,)] * len(model.blocks)


# --- timm's Beit at any image size: the attention takes its table of relative positions for the grid it is given


class OwnTable(NamedTuple):
    """Stands for the shared bias in a call of a block whose attention has a table of its own."""

    grid: Grid
    rule: str


class GridAttention(BeitAttention):  # type: ignore[misc]
    """timm's attention; with :class:`OwnTable` in place of the shared bias it uses its own table for that grid."""

    _wanted: OwnTable | None = None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | OwnTable | None = None) -> Tensor:
        # Set anew in every call, so that a recomputed block sees the grid of its own images.
        self._wanted = shared_rel_pos_bias if isinstance(shared_rel_pos_bias, OwnTable) else None
        return super().forward(x, shared_rel_pos_bias=None if self._wanted else shared_rel_pos_bias)

    def _get_rel_pos_bias(self) -> Tensor:
        if self._wanted is None:
            return super()._get_rel_pos_bias()
        return relative_bias(self.relative_position_bias_table, tuple(self.window_size), *self._wanted)


def relative_bias(table: Tensor, native: Grid, grid: Grid, rule: str) -> Tensor:
    """Bias of the attention [1, K, 1+N, 1+N] for ``grid`` from the table of grid ``native``."""
    index = _index(table, grid)
    bias = resize_relative(table, native, grid, rule=rule)[index.flatten()]
    return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


@made_once
def _index(grid: Grid) -> Tensor:
    index: Tensor = gen_relative_position_index(grid)
    return index


# --- other image sizes of models that do not run block by block


def free_image_size(model: Any) -> None:
    """Let a built Swin take other image sizes: its windows are padded and their masks computed for each size."""
    masked = [module for module in model.modules() if hasattr(module, "dynamic_mask")]
    if masked and hasattr(model, "patch_embed"):
        model.patch_embed.strict_img_size = False
        for module in masked:
            module.dynamic_mask = True


def built_at(model: Any, image_size: tuple[int, int]) -> Any:
    """A new model of this kind for images of (H, W) pixels; ``model`` if that takes any, InputError if timm cannot."""
    name, arguments = registered_name(model), getattr(model, "_model_args", {})
    try:
        with torch.random.fork_rng(devices=[]):
            new: Any = timm.create_model(name, pretrained=False, **(arguments | {"img_size": image_size}))
        if type(new) is not type(model):
            raise ValueError("it was changed after timm made it")
        return new
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "unexpected keyword argument 'img_size'" in str(error):
            return model  # convolutions
        height, width = image_size
        raise InputError(
            f"{name or type(model).__name__} cannot be built for images of {height}x{width} pixels "
            f"({' '.join(str(error).split())[:120]}); choose another image_size, or leave it out"
        ) from error


def resized_state(model: Any, new: Any) -> dict[str, Tensor]:
    """State dict of ``model`` for ``new``, which is built at another size; on the device of ``new``.

    What timm resizes when it loads weights of another size is resized so (relative tables); tables of absolute
    positions, which it then refuses, bicubically with antialiasing. Raises InputError for tables of another kind.
    """
    wanted = new.state_dict()
    state = {name: tensor.to(next(iter(wanted.values())).device) for name, tensor in model.state_dict().items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of torch's future, by relative tables
        state = dict(convert(state, new) if convert else state)
    for key, value in wanted.items():
        if key.rpartition(".")[2] == "pos_embed" and state[key].ndim == 3 and state[key].shape != value.shape:
            grids = [tuple(getattr(m, "tokens_spatial_shape", None) or m.patch_embed.grid_size) for m in (model, new)]
            state[key] = resample_abs_pos_embed(state[key], list(grids[1]), list(grids[0]), num_prefix_tokens=0)
        if state[key].shape != value.shape:
            raise InputError(
                f"{architecture_name(model)} has positions ({key}) that are not brought to another image size; leave "
                "image_size out"
            )
    return state


@torch.no_grad()
def rebuilt(model: Any, image_size: tuple[int, int]) -> Any:
    """:func:`built_at` with the weights of ``model``."""
    new = built_at(model, image_size)
    if new is model:
        return model
    new.load_state_dict(resized_state(model, new))
    for ours, theirs in zip(new.modules(), model.modules(), strict=True):
        if hasattr(theirs, "eps"):
            ours.eps = theirs.eps
    free_image_size(new)
    return new.train(model.training).to(next(model.parameters()))


_RUNNERS: dict[type, PlainRunner] = {
    VisionTransformer: PlainRunner(),
    PostNormVisionTransformer: PlainRunner(),
    VariantVisionTransformer: PlainRunner(),
    CapiVisionTransformer: RotaryRunner(),
    Beit: BeitRunner(),
    Eva: EvaRunner(),
}


def runner_for(model: Any) -> PlainRunner | None:
    """The runner of a model's kind; None for one that is only asked through its ``forward_intermediates``."""
    return _RUNNERS.get(type(model))


# --- a block that keeps less of its forward pass and computes the rest again in the backward pass

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


# --- a block for the class token alone

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
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(x)
    gamma = getattr(block, f"gamma_{number}")
    return x if gamma is None else gamma * x


def _attended(attention: Any, x: Tensor, extra: Any = None) -> Tensor:
    """The attention's output [B, 1, D] for its first token; ``extra``: Beit's bias, or Eva's rotations."""
    heads = attention.num_heads
    query, key, value = attention.qkv.weight.unflatten(0, (3, heads, -1)).unbind(0)  # [K, d, D]
    query_bias, key_bias, value_bias = (getattr(attention, f"{name}_bias", None) for name in "qkv")
    if isinstance(attention, Attention) and attention.qkv.bias is not None:
        query_bias, key_bias, value_bias = attention.qkv.bias.chunk(3)
    q = F.linear(x[:, 0], query.flatten(0, 1), query_bias).unflatten(1, (heads, -1))  # [B, K, d]
    rotations = extra if isinstance(attention, EvaAttention) else None
    normed = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if rotations is None and all(norm is None or isinstance(norm, nn.Identity) for norm in normed):
        folded = torch.bmm(q.transpose(0, 1), key).transpose(0, 1)  # [B, K, D]
        logits = torch.bmm(folded, x.mT)
    else:
        logits = _logits_of_keys(attention, q, F.linear(x, key.flatten(0, 1), key_bias), rotations)
    logits = logits * attention.scale
    if isinstance(extra, OwnTable):
        extra = relative_bias(attention.relative_position_bias_table, tuple(attention.window_size), *extra)
    bias = extra if isinstance(attention, BeitAttention) else None
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
