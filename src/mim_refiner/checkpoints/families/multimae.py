"""Files of MultiMAE (Bachmann et al., arXiv 2204.01678; layout of github.com/EPFL-VILAB/MultiMAE): images alone.

Every modality has its own patch projection and table; the class token, called global, has no position and stands last,
which the attention does not notice. No final norm; features are pooled by the mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import PARTS
from mim_refiner.checkpoints.families.vit import vit_family

_RGB = "input_adapters.rgb."
KEYS = KeyMap(
    [
        (f"{_RGB}proj.{{p}}", "patch_embed.proj.{p}"),
        (f"{_RGB}pos_emb", "pos_embed"),
        ("global_tokens", "cls_token"),
        *(("encoder.{i}." + part, "blocks.{i}." + part) for part in PARTS),
    ]
)
_DROPPED = {"input_adapters.": "another modality", "output_adapters.": "decoder, used only in pre-training"}


def matches(view: View) -> bool:
    return {"global_tokens", "encoder.0.attn.qkv.weight"} <= view.tensors.keys()


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    table, weight, tokens = (tensors[name] for name in ("pos_embed", "patch_embed.proj.weight", "cls_token"))
    tensors["pos_embed"] = table.flatten(2).transpose(1, 2)
    if tokens.shape[1] > 1:
        tensors["cls_token"], tensors["reg_token"] = tokens[:, :1], tokens[:, 1:]
    return {"known_size": tuple(side * patch for side, patch in zip(table.shape[2:], weight.shape[2:], strict=True))}


FAMILY = vit_family(
    "multimae", matches, keys=KEYS, anchor=f"{_RGB}proj.weight", dropped=_DROPPED, prepare=_prepare,
    final_norm=False, pooling="mean",
)  # fmt: skip
