"""Encoders that are known and refused by name, each with the reason: no image alone is what they encode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes
from mim_refiner.errors import CheckpointError

State = Mapping[str, Tensor]


def _ends(state: State, ending: str) -> Tensor | None:
    """The first tensor whose name ends so, at a dot."""
    return next((tensor for name, tensor in state.items() if name == ending or name.endswith("." + ending)), None)


def _satmae_groups(state: State) -> bool:
    return _ends(state, "channel_embed") is not None and _ends(state, "patch_embed.0.proj.weight") is not None


def _satmae_temporal(state: State) -> bool:
    table, token, projection = (_ends(state, name) for name in ("pos_embed", "cls_token", PROJECTION))
    known = table is not None and token is not None and projection is not None
    return known and table.ndim == 3 and projection.ndim == 4 and 0 < table.shape[2] < token.shape[-1]  # type: ignore[union-attr]


def _video(state: State) -> bool:
    projection = _ends(state, PROJECTION)
    deep = projection is not None and projection.ndim == 5 and projection.shape[2] > 1
    return deep and (_ends(state, "cls_token") is not None or _ends(state, "pos_embed_temporal") is not None)


def _dinov3(state: State) -> bool:
    return _ends(state, "rope_embed.periods") is not None


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
