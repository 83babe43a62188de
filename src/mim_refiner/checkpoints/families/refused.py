"""Encoders that are known and refused by name, each with the reason: no image alone is what they encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes
from mim_refiner.errors import CheckpointError


def _with(view: View, ending: str) -> Iterator[tuple[str, Tensor]]:
    """(what stands before it, tensor) of every name that ends so, at a dot."""
    for name, tensor in view.tensors.items():
        if name == ending or name.endswith("." + ending):
            yield name.removesuffix(ending), tensor


def _satmae_temporal(view: View) -> bool:
    for start, table in _with(view, "pos_embed"):
        token, projection = view.tensors.get(f"{start}cls_token"), view.tensors.get(start + PROJECTION)
        if token is None or projection is None or table.ndim != 3 or projection.ndim != 4:
            continue
        if 0 < table.shape[2] < token.shape[-1]:
            return True
    return False


def _video(view: View) -> bool:
    return any(
        projection.ndim == 5
        and projection.shape[2] > 1
        and bool({f"{start}cls_token", f"{start}pos_embed_temporal"} & view.tensors.keys())
        for start, projection in _with(view, PROJECTION)
    )


def _family(name: str, matches: Callable[[View], bool], reason: str) -> Family:
    def refuse(view: View, wishes: Wishes) -> Converted:
        raise CheckpointError(f"{view.where}: is {reason}")

    return Family(name, PROJECTION, matches, refuse, any_names=True)


FAMILIES = (
    _family(
        "satmae_groups",
        lambda view: any(f"{at}patch_embed.0.proj.weight" in view.tensors for at, _ in _with(view, "channel_embed")),
        "a SatMAE with groups of channels: every place of the image has a token for each group, as in no plain "
        "ViT; use SatMAE's RGB encoder, or another encoder of many bands (SSL4EO-S12, Prithvi)",
    ),
    _family(
        "satmae_temporal",
        _satmae_temporal,
        "a temporal SatMAE: it encodes three images and their dates together, and has no meaning for one image; use "
        "SatMAE's RGB encoder",
    ),
    _family(
        "video",
        _video,
        "a video encoder whose class token and positions are those of many frames, so that one image is nothing it was "
        "trained for; use an encoder of images",
    ),
    _family(
        "hf_video",
        lambda view: any(t.ndim == 5 for _, t in _with(view, "embeddings.patch_embeddings.projection.weight")),
        "a video encoder of transformers (VideoMAE or ViViT); load the VideoMAE file of its authors, where an image is "
        "read as one tubelet of equal frames, or an encoder of images",
    ),
    _family(
        "dinov3",
        lambda view: any(_with(view, "rope_embed.periods")),
        "a DINOv3 in its authors' layout; load timm's conversion, for example vit_base_patch16_dinov3.lvd1689m",
    ),
    _family(
        "vitpose_plus",
        lambda view: any(".mlp.experts." in name for name in view.tensors),
        "a ViTPose+ whose MLPs have a part for every data set; split it by the authors' tools/model_split.py first",
    ),
)
