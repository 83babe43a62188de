"""Encoders that something beside the weights describes: a config.json in timm's layout, or a key map of one's own.

A key map (Python mapping or YAML file) says which of an encoder's tensors is which of timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models import is_model_in_modules
from torch import Tensor

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
from mim_refiner.checkpoints.families.keymap import ZEROS, KeyMap, Template
from mim_refiner.checkpoints.families.mae import free_registers
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit, infer_structure, is_square, make_family
from mim_refiner.checkpoints.store import OWN_FACTS
from mim_refiner.errors import CheckpointError, InputError, did_you_mean
from mim_refiner.files import errors_as, read_yaml
from mim_refiner.models.positions import computed_table
from mim_refiner.models.vit import VIT_MODULES
from mim_refiner.reporting import number_of
from mim_refiner.settings import said
from mim_refiner.types import height_width

# --- weights under timm's own names: a state dict file of a plain ViT, or a timm folder (config.json + weights)


def _matches(view: View) -> bool:
    """A plain ViT under timm's names, or anything with a config.json that no other family claims."""
    return view.config is not None or has_plain_vit(view.tensors)


# timm drops init_values=None and takes the name's own value; 0 leaves layer scale out of these.
_UNSCALED_BY_ZERO = ["beit", "vision_transformer", "deit"]
_BARE = make_family("timm", _matches, mean=None, std=None, position_rule="timm")


def _convert(view: View, wishes: Wishes) -> Converted:
    """With a config.json the architecture is built as it says, otherwise the structure is read from the tensors."""
    config = view.config
    if config is None:
        return _BARE.convert(view, wishes)
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


TIMM = Family("timm", PROJECTION, _matches, _convert, any_names=True)

# --- encoders of one's own, by a key map

_SIZED_BY_TENSORS = ("vit_postnorm", "vit_variant")  # beside timm's plain ViTs
_Heads = Annotated[int, Field(ge=1, strict=True)]


class OwnKeyMap(BaseModel):
    """A key map. ``keys``: timm's name -> the file's name, or the names that are joined along dimension 0.

    ``{i}`` stands for a block number, ``{p}`` for weight or bias, ``{n}`` for a number that does not matter (a chunk of
    blocks); "0" among joined names for zeros. Names that are timm's already need no entry. ``positions``: a table that
    the file has not because the code computes it. ``num_heads``: one number, or one a block.
    """

    model_config = ConfigDict(extra="forbid")

    keys: dict[str, str | list[str]] = Field(default_factory=dict)
    drop: dict[str, str] = Field(default_factory=dict)  # start of a name -> why the encoder does not take it
    architecture: str = "vit"  # a timm name; "vit" = a plain ViT of the size that the tensors have
    arguments: dict[str, Any] = Field(default_factory=dict)  # for timm's constructor; they win over the tensors
    num_heads: _Heads | list[_Heads] | None = None
    positions: Literal["table", "sincos", "sinusoid"] = "table"  # sincos: by row and column; sinusoid: by number
    norm_eps: float | None = Field(None, gt=0)
    position_rule: Literal["timm", "bicubic", "dino", "hf"] | None = None  # None = timm's, or the table computed anew
    pooling: Literal["cls", "mean"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    family: str = "own"
    licence: str | None = None


def read_key_map(given: Mapping[str, Any] | str | Path) -> OwnKeyMap:
    """Check a key map given as a mapping or as a YAML file; InputError in one line for what is wrong."""
    where = "key_map"
    if isinstance(given, str | Path):
        where = str(given)
        with errors_as(InputError, f"{where}: the key map cannot be read", "give a YAML file"):
            given = read_yaml(Path(given).expanduser())
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: a key map is a mapping with the entry 'keys'; see the README")
    try:
        return OwnKeyMap.model_validate({str(name): value for name, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if not re.search(r"^constrained|\[|^(str|int)$", str(part)))
        hint = did_you_mean(name, OwnKeyMap.model_fields) if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{where}: {name}: {said(first)}{hint}") from error


def own_family(given: Mapping[str, Any] | str | Path) -> Family:
    """A family that reads files as the key map says."""
    key_map = read_key_map(given)
    rules: list[tuple[Template, str]] = [
        (source if isinstance(source, str) else tuple(source), target) for target, source in key_map.keys.items()
    ]
    named, dropped = KeyMap(rules), tuple(key_map.drop)
    # names that pass as they are: all that neither a rule nor a reason to drop speaks of
    keys = KeyMap(rules, same=lambda name: not named.knows(name) and not name.startswith(dropped))
    for source, target in rules:
        parts = [part for part in ((source,) if isinstance(source, str) else source) if part != ZEROS]
        wanted = set(re.findall(r"{(\w+)}", target))
        if not parts or any(not wanted <= set(re.findall(r"{(\w+)}", part)) for part in parts):
            raise InputError(f"key map: {target}: its placeholders must stand in {' and '.join(parts) or 'a name'} too")
    to_projection = (source for source, target in rules if target.replace("{p}", "weight") == PROJECTION)
    anchor = next(to_projection, PROJECTION)
    if not isinstance(anchor, str):
        raise InputError(f"key map: {PROJECTION} cannot be joined of several tensors; name one")
    computed = key_map.positions if key_map.positions != "table" else "timm"
    family = make_family(
        key_map.family,
        lambda view: True,  # for the caller says so; what does not fit shows in the coverage
        anchor=anchor.replace("{p}", "weight"),
        to_timm=keys.to_timm,
        infer=partial(_infer, key_map=key_map),
        dropped=key_map.drop,
        position_rule=key_map.position_rule or computed,
        **key_map.model_dump(include={"mean", "std", "licence", "norm_eps", "pooling"}),
    )
    return replace(family, any_names=True)


def _infer(tensors: dict[str, Tensor], wishes: Wishes, key_map: OwnKeyMap) -> Converted:
    given = key_map.arguments.items()
    arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    architecture, by_block = key_map.architecture, key_map.num_heads if isinstance(key_map.num_heads, list) else None
    if by_block and not wishes.num_heads:
        arguments["block_heads"] = tuple(by_block)
        architecture = "vit_variant" if architecture == "vit" else architecture
    by_argument = arguments.pop("num_heads", 0)
    if type(by_argument) is not int:
        raise InputError(f"key map: arguments: num_heads={ascii(by_argument)[:40]} is no whole number; correct it")
    said = by_block[0] if by_block else key_map.num_heads
    heads: Any = wishes.num_heads or said or by_argument
    weight = tensors.get(PROJECTION)
    channels = int(arguments.get("in_chans", 3)) if weight is None or weight.ndim < 2 else weight.shape[1]
    for name, values in (("mean", key_map.mean), ("std", key_map.std)):
        if values is not None and len(values) not in (channels, wishes.in_chans):
            has = f"has {number_of(len(values), 'values')}, the encoder has {number_of(channels, 'channels')}"
            raise InputError(f"key map: {name}: {has}; give one a channel")
    plain = architecture == "vit" or architecture in _SIZED_BY_TENSORS
    if not plain and not timm.is_model(architecture.partition(".")[0]):
        close = did_you_mean(architecture, timm.list_models())
        raise InputError(f"key map: architecture '{architecture}' is unknown to timm{close}")
    if not plain and not is_model_in_modules(architecture.partition(".")[0], VIT_MODULES):
        return Converted(architecture, arguments, heads or -1, tensors)
    if PROJECTION not in tensors:
        raise CheckpointError(
            f"{wishes.where}: the key map leads no tensor to {PROJECTION}; name the first convolution in its keys"
        )
    size = height_width(arguments["img_size"]) if "img_size" in arguments else wishes.told_size
    _complete_table(tensors, key_map.positions, size or wishes.image_size, wishes.where)
    vit = infer_structure(tensors, wishes, known_heads=heads, known_size=size)
    architecture = vit.architecture if architecture == "vit" else architecture
    heads = vit.num_heads or (0 if plain else -1)
    return replace(vit, architecture=architecture, arguments=vit.arguments | arguments, num_heads=heads)


def _complete_table(tensors: dict[str, Tensor], positions: str, size: tuple[int, int] | None, where: str) -> None:
    """Compute the table that the code behind the file computes; free a table of the entries of registers."""
    table, weight = tensors.get("pos_embed"), tensors[PROJECTION]
    if positions != "table":
        if table is not None:
            raise InputError(f"{where}: has a table of positions (pos_embed); leave positions: {positions} out")
        if size is None:
            raise InputError(
                f"{where}: positions: {positions} needs the image size; pass image_size= or arguments: img_size"
            )
        grid = (size[0] // weight.shape[-2], size[1] // weight.shape[-1])
        tensors["pos_embed"] = computed_table(positions, weight.shape[0], grid)
    elif table is not None and table.ndim == 3 and "reg_token" in tensors:
        lengths = {table.shape[1] - rest for rest in (0, 1 + tensors["reg_token"].shape[1])}
        if not any(map(is_square, lengths)):
            free_registers(tensors)
