"""Hugging Face transformers: BEiT with relative tables shared or per block, or absolute positions; Data2VecVision.

Data2VecVision, the first data2vec, has BEiT's architecture and names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.beit import BEIT_MEAN, BEIT_STD
from mim_refiner.checkpoints.families.plain_beit import infer_beit
from mim_refiner.types import BackboneInfo


def matches(view: View) -> bool:
    """BEiT's biases; a config.json, if any, says beit."""
    return hf.is_kind(view, "beit") and hf.has_query_bias_only(view)


def matches_data2vec(view: View) -> bool:
    """BEiT's biases and a config.json that says data2vec-vision, or the prefix of its task models."""
    named = view.model_type == "data2vec-vision" or (
        view.contents.config is None and "data2vec_vision" in view.prefix.split(".")
    )
    return named and hf.has_query_bias_only(view)


def convert(view: View, wishes: Wishes) -> Converted:
    hf.check_activation(view)
    view = _with_outer_norm(view)
    mapped = hf.BEIT_KEYS.to_timm(view.tensors)
    beit = infer_beit(mapped.tensors, wishes, view.where, **hf.facts(view))
    return Converted(
        beit.architecture,
        beit.arguments,
        beit.num_heads,
        **account(view, mapped, hf.DROPPED),
        **hf.mean_and_std(view, BEIT_MEAN, BEIT_STD),
        norm_eps=hf.norm_eps(view),
        without=_without(view, mapped.tensors),
        position_rule=_position_rule(mapped.tensors, beit.arguments["img_size"]),
        pooling="mean" if (view.contents.config or {}).get("use_mean_pooling", True) else "cls",
        notes=beit.notes,
    )


def _position_rule(tensors: Mapping[str, Tensor], image_size: tuple[int, int]) -> str:
    """transformers reads a relative table columns first, which matters where the image is no square."""
    relative = any(name.endswith("relative_position_bias_table") for name in tensors)
    return "hf_transposed" if relative and image_size[0] != image_size[1] else "hf"


def _without(view: View, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A model that pools by the mean has its norm in the pooler, and none without pooler."""
    mean_pooling = (view.contents.config or {}).get("use_mean_pooling", True)
    has_norm = any(name.startswith(("norm.", "fc_norm.")) for name in tensors)
    return ("norm", "fc_norm") if mean_pooling and not has_norm else ()


def _with_outer_norm(view: View) -> View:
    """In BeitForMaskedImageModeling the encoder's final norm lies outside "beit."."""
    outer = {short: name for short, name in view.beside.items() if short.startswith("layernorm.")}
    if not outer or "layernorm.weight" in view.tensors:
        return view
    section = view.contents.section(view.section)
    return replace(
        view,
        tensors=view.tensors | {short: section[name] for short, name in outer.items()},
        names=view.names | outer,
        outside={short: name for short, name in view.outside.items() if name not in outer.values()},
    )


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """State dict of a BeitModel or Data2VecVisionModel file (no prefix)."""
    return hf.BEIT_KEYS.from_timm(state)


FAMILY = Family("hf_beit", hf.ANCHOR, matches, convert, to_source)
DATA2VEC = replace(FAMILY, name="hf_data2vec_vision", matches=matches_data2vec)
