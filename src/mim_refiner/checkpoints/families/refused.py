"""Encoders that are known and refused by name, each with the reason: no image alone is what they encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes
from mim_refiner.errors import CheckpointError

State = Mapping[str, Tensor]


def _with(state: State, ending: str) -> Iterator[tuple[str, Tensor]]:
    """(what stands before it, tensor) of every name that ends so, at a dot."""
    for name, tensor in state.items():
        if name == ending or name.endswith("." + ending):
            yield name.removesuffix(ending), tensor


def _satmae_groups(state: State) -> bool:
    return any(f"{start}patch_embed.0.proj.weight" in state for start, _ in _with(state, "channel_embed"))


def _satmae_temporal(state: State) -> bool:
    for start, table in _with(state, "pos_embed"):
        token, projection = state.get(f"{start}cls_token"), state.get(start + PROJECTION)
        if token is None or projection is None or table.ndim != 3 or projection.ndim != 4:
            continue
        if 0 < table.shape[2] < token.shape[-1]:
            return True
    return False


def _video(state: State) -> bool:
    return any(
        projection.ndim == 5
        and projection.shape[2] > 1
        and bool({f"{start}cls_token", f"{start}pos_embed_temporal"} & state.keys())
        for start, projection in _with(state, PROJECTION)
    )


def _hf_video(state: State) -> bool:
    name = "embeddings.patch_embeddings.projection.weight"
    return any(projection.ndim == 5 for _, projection in _with(state, name))


def _dinov3(state: State) -> bool:
    return any(True for _ in _with(state, "rope_embed.periods"))


def _vitpose_plus(state: State) -> bool:
    return any(".mlp.experts." in name for name in state)


_KNOWN: dict[str, tuple[Callable[[State], bool], str]] = {
    "satmae_groups": (
        _satmae_groups,
        "a SatMAE with groups of channels: every place of the image has a token for each group, as in no plain "
        "ViT; use SatMAE's RGB encoder, or another encoder of many bands (SSL4EO-S12, Prithvi)",
    ),
    "satmae_temporal": (
        _satmae_temporal,
        "a temporal SatMAE: it encodes three images and their dates together, and has no meaning for one image; use "
        "SatMAE's RGB encoder",
    ),
    "video": (
        _video,
        "a video encoder whose class token and positions are those of many frames, so that one image is nothing it was "
        "trained for; use an encoder of images",
    ),
    "hf_video": (
        _hf_video,
        "a video encoder of transformers (VideoMAE or ViViT); load the VideoMAE file of its authors, where an image is "
        "read as one tubelet of equal frames, or an encoder of images",
    ),
    "dinov3": (
        _dinov3,
        "a DINOv3 in its authors' layout; load timm's conversion, for example vit_base_patch16_dinov3.lvd1689m",
    ),
    "vitpose_plus": (
        _vitpose_plus,
        "a ViTPose+ whose MLPs have a part for every data set; split it by the authors' tools/model_split.py first",
    ),
}


def _family(name: str, is_it: Callable[[State], bool], reason: str) -> Family:
    def refuse(view: View, wishes: Wishes) -> Converted:
        raise CheckpointError(f"{view.where}: is {reason}")

    return Family(name, PROJECTION, lambda view: is_it(view.tensors), refuse, any_names=True)


FAMILIES = tuple(_family(name, is_it, reason) for name, (is_it, reason) in _KNOWN.items())
