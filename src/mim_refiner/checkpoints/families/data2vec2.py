"""Files of data2vec 2.0 (Baevski et al., arXiv 2212.07525; layout of fairseq examples/data2vec), images only.

Post-norm blocks, a norm after the embedding, none at the end. Pre-training files hold the student and, as a nested
dictionary ``_ema``, its running average; the authors fine-tune the student, and so it is the default.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import is_encoder_name
from mim_refiner.checkpoints.families.vit import vit_family

_IMAGE = "modality_encoders.IMAGE."
ANCHOR = f"{_IMAGE}local_encoder.proj.weight"
KEYS = KeyMap(
    [
        (f"{_IMAGE}local_encoder.proj.{{p}}", "patch_embed.proj.{p}"),
        (f"{_IMAGE}extra_tokens", "cls_token"),
        (f"{_IMAGE}fixed_positional_encoder.positions", "pos_embed"),
        (f"{_IMAGE}context_encoder.norm.{{p}}", "norm_pre.{p}"),
    ],
    same=lambda name: name.startswith("blocks.") and is_encoder_name(name),
)
_DROPPED = {
    f"{_IMAGE}decoder.": "decoder, used only for reconstruction",
    f"{_IMAGE}alibi": "bias of the attention, unused for images",
    "fc_norm.": "norm of the classifier",
}


def matches(view: View) -> bool:
    return view.config is None and "blocks.0.attn.qkv.weight" in view.tensors


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    return {"known_heads": view.contents.fact("num_heads") or 0, "arguments": {"no_embed_class": True}}


FAMILY = vit_family(
    "data2vec2", matches, keys=KEYS, anchor=ANCHOR, dropped=_DROPPED, prepare=_prepare, final_norm=False,
    architecture="vit_postnorm", default_encoder=("model", "student"),
)  # fmt: skip
