"""Weights under timm's own names: a state dict file of a plain ViT, or a timm folder (config.json + weights)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import is_model_in_modules

from mim_refiner.checkpoints.families.base import (
    DROPPED,
    LAYER_SCALE,
    PROJECTION,
    Converted,
    Family,
    View,
    Wishes,
    reason_to_drop,
)
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit, make_family
from mim_refiner.checkpoints.store import OWN_FACTS
from mim_refiner.errors import CheckpointError


def matches(view: View) -> bool:
    """A plain ViT under timm's names, or anything with a config.json that no other family claims."""
    return view.config is not None or has_plain_vit(view.tensors)


# timm drops init_values=None and takes the name's own value; 0 leaves layer scale out of these.
_UNSCALED_BY_ZERO = ["beit", "vision_transformer", "deit"]
_BARE = make_family("timm", matches, mean=None, std=None, position_rule="timm")


def convert(view: View, wishes: Wishes) -> Converted:
    """With a config.json the architecture is built as it says, otherwise the structure is read from the tensors."""
    config = view.config
    return _BARE.convert(view, wishes) if config is None else _from_config(view, config, wishes)


def _from_config(view: View, config: Mapping[str, Any], wishes: Wishes) -> Converted:
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        kind = config.get("model_type") or ", ".join(list(config)[:4]) or "nothing"
        raise CheckpointError(f"{view.where}: its config names no timm 'architecture' (it has: {kind}); give one")
    preprocessing = _mapping(config, "pretrained_cfg", view.where) or config  # older folders have one level only
    given = _mapping(config, "model_args", view.where).items()
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in given}
    arguments.pop("num_classes", None)
    unscaled = arguments.get("init_values", 0) is None and not any("gamma" in name for name in view.tensors)
    by_zero = unscaled and is_model_in_modules(architecture.partition(".")[0], _UNSCALED_BY_ZERO)
    if by_zero:
        arguments["init_values"] = 0.0
    first_conv, shape = preprocessing.get("first_conv"), preprocessing.get("input_size")
    known = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    heads = preprocessing.get("classifier") or (known.classifier if known else None) or "head"
    without = tuple(str(name) for name in _mapping(config, OWN_FACTS, view.where).get("without") or ())
    without += (LAYER_SCALE,) if unscaled and not by_zero else ()
    reasons = {f"{head}.": "classifier" for head in ([heads] if isinstance(heads, str) else heads)}
    reasons |= {f"{name}.": "only there for timm, not part of the encoder" for name in without}
    reasons |= {name: DROPPED[name] for name in ("mask_token", "masked_embed", "decoder", "lm_head.")}
    tensors = {name: tensor for name, tensor in view.tensors.items() if not reason_to_drop(name, reasons)}
    return Converted(
        architecture,
        arguments,
        wishes.num_heads or -1,
        tensors,
        origin={view.names[name]: name for name in tensors},
        reasons=reasons,
        mean=tuple(preprocessing.get("mean") or ()) or None,
        std=tuple(preprocessing.get("std") or ()) or None,
        licence=preprocessing.get("license"),
        position_rule="flexi" if architecture.startswith("flexi") else "timm",
        without=without,
        image_size=(int(shape[1]), int(shape[2])) if isinstance(shape, list) and len(shape) == 3 else None,
        projection=f"{first_conv}.weight" if isinstance(first_conv, str) else PROJECTION,
    )


def _mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: '{key}' in its config.json must be a JSON object; write or download it again")
    return value


FAMILY = Family("timm", PROJECTION, matches, convert, reads_config=True)
