"""Weights under timm's own names: a state dict file of a plain ViT, or a timm folder (config.json + weights)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import Converted, Family, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit, infer_structure, is_encoder_name
from mim_refiner.checkpoints.store import Contents, strip_wrappers
from mim_refiner.errors import CheckpointError

NAME = "timm"
OWN_FACTS = "mim_refiner"  # key in config.json under which our exports keep what timm has no field for

_CLASSIFIER = ("head.", "head_dist.", "fc.", "classifier.")


def find_section(contents: Contents) -> str | None:
    """The first of the usual places that holds a ViT under timm's names."""
    for path in ("", "model", "state_dict"):
        if has_plain_vit({strip_wrappers(name) for name in contents.section(path)}):
            return path
    return "" if contents.config is not None and contents.section("") else None


def convert(contents: Contents, section: str, wishes: Wishes) -> Converted:
    """Names stay as they are; a classifier is left out.

    With a config.json the architecture is built as it says, otherwise the structure is read from the tensors.
    """
    tensors = {strip_wrappers(name): tensor for name, tensor in contents.section(section).items()}
    names = {strip_wrappers(name): name for name in contents.section(section)}
    if contents.config is not None:
        return _from_config(contents, contents.config, tensors, names, wishes)
    dropped = {names[name]: "classifier" for name in tensors if name.startswith(_CLASSIFIER)}
    kept = {name: tensor for name, tensor in tensors.items() if names[name] not in dropped}
    encoder = {name: tensor for name, tensor in kept.items() if is_encoder_name(name)}
    vit = infer_structure(encoder, wishes, contents.source)
    return Converted(
        architecture=vit.architecture,
        arguments=vit.arguments,
        num_heads=vit.num_heads,
        tensors=encoder,
        origin={name: names[name] for name in encoder},
        dropped=dropped,
        unplaced=tuple(names[name] for name in kept if name not in encoder),
        notes=vit.notes,
    )


def _from_config(
    contents: Contents,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    names: dict[str, str],
    wishes: Wishes,
) -> Converted:
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        kind = config.get("model_type") or ", ".join(list(config)[:4]) or "nothing"
        raise CheckpointError(
            f"{contents.source}: its config.json names no timm 'architecture' (it has: {kind}); give a timm folder"
        )
    preprocessing = _mapping(config, "pretrained_cfg", contents.source) or config  # older folders have one level only
    facts = _mapping(config, OWN_FACTS, contents.source)
    model_args = _mapping(config, "model_args", contents.source)
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in model_args.items()}
    arguments.pop("num_classes", None)
    classifier = preprocessing.get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    dropped = {name for name in tensors if name.startswith(tuple(f"{head}." for head in heads))}
    return Converted(
        architecture=architecture,
        arguments=arguments,
        num_heads=wishes.num_heads or -1,  # -1: the architecture itself says
        tensors={name: tensor for name, tensor in tensors.items() if name not in dropped},
        origin={name: names[name] for name in tensors},
        dropped={names[name]: "classifier" for name in dropped},
        mean=_floats(preprocessing.get("mean")),
        std=_floats(preprocessing.get("std")),
        licence=facts.get("licence") or preprocessing.get("license"),
        family=facts.get("family"),
    )


def _mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: '{key}' in its config.json must be a JSON object; write or download it again")
    return value


def _floats(values: Any) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if values else None


FAMILY = Family(NAME, find_section, convert)
