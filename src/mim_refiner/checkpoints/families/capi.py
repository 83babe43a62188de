"""Files of CAPI (Darcet et al., arXiv 2502.08769; layout of github.com/facebookresearch/capi).

No class token; registers first; rotary positions with frequencies in every block; RMSNorm; no biases; separate
projections for query, key and value, which are joined here; a final norm without parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import DROPPED, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import choose_heads, count_blocks, mlp_ratio, projection_sizes
from mim_refiner.errors import CheckpointError
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD
from mim_refiner.types import BackboneInfo

_BLOCK = "encoder.blocks.{i}."
_ATTENTION = f"{_BLOCK}residual1.fn."
KEYS = KeyMap(
    [
        ("patch_embed.{p}", "patch_embed.proj.{p}"),
        ("registers", "reg_token"),
        (f"{_BLOCK}residual1.norm.weight", "blocks.{i}.norm1.weight"),
        (tuple(f"{_ATTENTION}{name}_proj.weight" for name in "qkv"), "blocks.{i}.attn.qkv.weight"),
        (f"{_ATTENTION}proj.weight", "blocks.{i}.attn.proj.weight"),
        (f"{_ATTENTION}rope.freqs", "blocks.{i}.attn.freqs"),
        (f"{_BLOCK}residual2.norm.weight", "blocks.{i}.norm2.weight"),
        (f"{_BLOCK}residual2.fn.fc1.weight", "blocks.{i}.mlp.fc1.weight"),
        (f"{_BLOCK}residual2.fn.fc2.weight", "blocks.{i}.mlp.fc2.weight"),
    ]
)


def matches(view: View) -> bool:
    return {"registers", "encoder.blocks.0.residual1.fn.rope.freqs"} <= view.tensors.keys()


def convert(view: View, wishes: Wishes) -> Converted:
    mapped = KEYS.to_timm(view.tensors)
    tensors = mapped.tensors
    width, in_chans, patch = projection_sizes(tensors, view.where)
    if patch[0] != patch[1] or tensors["reg_token"].shape[1] % 4:
        raise CheckpointError(
            f"{view.where}: CAPI has square patches and a multiple of 4 registers; the file has not; download it again"
        )
    depth = count_blocks(tensors)
    heads, notes = choose_heads(width, depth, width // tensors["blocks.0.attn.freqs"].shape[1], wishes, view.where)
    side = 16  # positions are relative to the image, so the file has no size; 224 px with patches of 14
    arguments = {
        "img_size": wishes.image_size or side * patch[0],
        "patch_size": patch[0],
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": mlp_ratio(tensors, width),
        "reg_tokens": tensors["reg_token"].shape[1],
    }
    return Converted(
        "vit_capi",
        arguments,
        heads,
        **account(view, mapped, DROPPED),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        pooling="mean",
        notes=tuple(notes),
    )


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    return {f"backbone.{name}": tensor for name, tensor in KEYS.from_timm(state).items()}


FAMILY = Family("capi", "patch_embed.weight", matches, convert, to_source)
