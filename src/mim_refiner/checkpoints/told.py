"""What a checkpoint says of itself beside its weights: the arguments of the training and the config beside the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm

from mim_refiner.checkpoints.families import Converted, Wishes
from mim_refiner.checkpoints.families.base import GUESS
from mim_refiner.checkpoints.store import OWN_FACTS, Contents
from mim_refiner.errors import CheckpointError
from mim_refiner.models.positions import RULES
from mim_refiner.models.vit import SIZES
from mim_refiner.reporting import number_of

_HEADS = (
    "encoder_num_heads", "num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "nheads", "heads",
    "vit_heads", "attention_heads",
)  # fmt: skip
_MODELS = ("model_name", "model", "arch", "architecture", "backbone", "encoder")
# size in a ViT's name: width and heads
_NAMED = {name: (width, heads) for (width, _, heads), name in SIZES.items()}
_NAMED |= {"little": (320, 5), "medium": (512, 8), "giant": (1408, 16)}
# Names that public code gives to encoders of 3 and 12 (MAE-Lite), or 6 and 12 heads (DINO and MoCo v3).
_DOUBTFUL = re.compile(r"mae_.*(tiny|small).*|(vit|deit)_tiny_.*|(vit|deit)_small")
_SIZES = ("input_size", "img_size", "image_size", "input_resolution", "imgsz", "global_crops_size")
_BEFORE_SIDES = (*(f"{size}." for size in _SIZES), "img_", "image_", "input_")
_PAIRS = [
    *(
        (start + rows, start + columns)
        for start in _BEFORE_SIDES
        for rows, columns in (("height", "width"), ("h", "w"))
    ),
    ("imgh", "imgw"),
    *(("target_length", columns) for columns in ("num_mel_bins", "n_mels", "num_mels")),
]
_MEANS, _STDS = ("image_mean", "img_mean", "pixel_mean", "mean"), ("image_std", "img_std", "pixel_std", "std")


def told(wishes: Wishes, contents: Contents) -> Wishes:
    """``wishes`` with heads and image size of the file's own arguments."""
    return replace(
        wishes,
        where=contents.source,
        told_heads=_count(contents, *_HEADS),
        told_head_dim=_count(contents, "head_dim", "dim_head"),
        told_model=_named(contents.fact(*_MODELS)),
        told_size=_size(contents),
    )


def _number(value: Any) -> float | None:
    """A number, also as text or as the one member of a tuple; None for anything else."""
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        return None


def _count(contents: Contents, *names: str) -> int:
    """A whole number above 0 in any spelling (4, 4.0, "4"), 0 for anything else."""
    number = _number(contents.fact(*names))
    return int(number) if number and 0 < number < 2**31 and number == int(number) else 0


def _named(model: Any) -> tuple[int, int]:
    """Width and heads of the plain ViT of that name; (0, 0) for others, and for names of several encoders."""
    name = str(model).partition(".")[0].lower()
    match = re.fullmatch(r"(?:mae_)?(?:vit|deit|deit3)_([a-z]+)(?:_.*)?", name)
    if match is None or (_DOUBTFUL.fullmatch(name) and not timm.is_model(name)):
        return 0, 0
    return _NAMED.get(match[1], (0, 0))


def _size(contents: Contents) -> tuple[int, int] | None:
    """Image size (height, width) in training; a spectrogram's is frames x mel bands, as AudioMAE lays it out."""
    size: Any = contents.fact(*_SIZES)
    if size is None:
        pairs = ((contents.fact(rows), contents.fact(columns)) for rows, columns in _PAIRS)
        size = next((pair for pair in pairs if None not in pair), None)
    if isinstance(size, str):
        match = re.fullmatch(r"[(\[]?(\d{1,6})(?:\s*[x,]\s*(\d{1,6}))?[)\]]?", size, re.ASCII)
        size = tuple(int(side) for side in match.groups(match[1])) if match else None
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) == 3:  # channels first, as timm writes it
        sides = sides[1:]
    return (sides[0], sides[1]) if len(sides) == 2 and all(type(n) is int and n > 0 for n in sides) else None


def with_own_facts(converted: Converted, contents: Contents, *, by_key_map: bool = False) -> Converted:
    """What the file says about how images go in; what an export of ours says about where the encoder comes from.

    ``by_key_map``: what ``converted`` already says is the caller's word, and counts first. Raises
    CheckpointError for an entry of the wrong type.
    """
    facts: dict[str, Any] = {}
    own = (contents.config or {}).get(OWN_FACTS)
    if isinstance(own, Mapping):
        facts = {name: own[name] for name in ("family", "licence", "position_rule", "norm_eps") if own.get(name)}
        facts |= {name: tuple(own[name]) for name in ("mean", "std") if isinstance(own.get(name), list)}
        facts |= {"pooling": own["encoder_pooling"]} if own.get("encoder_pooling") else {}
    elif contents.config is None:
        facts = _normalisation(contents)
        facts["notes"] = converted.notes + facts.get("notes", ())
        eps = _number(contents.fact("layer_norm_eps", "norm_eps", "layernorm_eps"))
        facts |= {"norm_eps": eps} if eps and 0 < eps < 1 else {}
        if converted.pooling is None and contents.fact("global_pool", "gp") in (True, "avg", "mean"):
            facts["pooling"] = "mean"
    if by_key_map:
        facts = {name: value for name, value in facts.items() if name == "notes" or getattr(converted, name) is None}
        if not {"mean", "std"} & set(facts):  # a remark on numbers that are not used
            facts.pop("notes", None)
    found = replace(converted, **facts)
    _check(found, contents.source)
    return found


def _normalisation(contents: Contents) -> dict[str, Any]:
    """Mean and std that the file's arguments name, on the scale 0-1, with a note on it; {} unless both are there."""
    found: list[Any] = [contents.fact(*names) for names in (_MEANS, _STDS)]
    for place, text in enumerate(found):
        if isinstance(text, str) and len(text) < 1000:  # of a list: "[0.5, 0.5, 0.5]"
            found[place] = tuple(map(_number, text.strip("()[] ").split(",")))
    mean, std = found
    if not (_numbers(mean) and _numbers(std) and len(mean) == len(std) and len(mean) > 1 and min(std) > 0):
        return {}
    top = max(*mean, *std)
    scale = 65535.0 if top > 255 else 255.0 if top > 2 else 1.0
    facts: dict[str, Any] = {"mean": tuple(v / scale for v in mean), "std": tuple(v / scale for v in std)}
    if top > 255:
        facts["notes"] = (f"{GUESS}mean and std (up to {top:g}) are of 16-bit pixels and were divided by 65535",)
    return facts


def guesses(converted: Converted, contents: Contents, channels: int) -> tuple[str, ...]:
    """What is not known about how images go in."""
    config, mean = contents.config or {}, converted.mean
    if mean is None or len(mean) != channels:
        named = "ImageNet's" if channels == 3 else f"ImageNet's, for {number_of(channels, 'channels')}"
        remedy = "refine with normalization=data, or say them by a key map"
        return (f"{GUESS}mean and std ({named}), which nothing tells; {remedy}",)
    if converted.std is None or ("model_type" in config and not config.get("preprocessor")):
        shown = " ".join(f"{value:g}" for value in mean)  # transformers keeps them in a second file
        return (f"{GUESS}mean ({shown}) and std of the family, since there is no preprocessor_config.json",)
    return ()


def _numbers(values: Any) -> bool:
    known = isinstance(values, tuple) and len(values) > 0
    return known and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _check(converted: Converted, where: str) -> None:
    """CheckpointError for a fact that is not of its type: it came from a config.json, which anyone may write."""
    eps = converted.norm_eps
    right = {
        "mean": converted.mean is None or _numbers(converted.mean),
        "std": converted.std is None or (_numbers(converted.std) and min(converted.std) > 0),
        "norm_eps": eps is None or (type(eps) in (int, float) and 0 < eps < 1),
        "licence": converted.licence is None or isinstance(converted.licence, str),
        "family": converted.family is None or isinstance(converted.family, str),
        "pooling": converted.pooling in (None, "cls", "mean"),
        "position_rule": isinstance(converted.position_rule, str) and converted.position_rule in RULES,
    }
    wrong = next((name for name, holds in right.items() if not holds), None)
    if wrong:
        raise CheckpointError(f"{where}: {wrong}={str(getattr(converted, wrong))[:50]} is unusable; correct it")
