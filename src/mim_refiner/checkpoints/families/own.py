"""Encoders of one's own: a key map (Python mapping or YAML file) says which of its tensors is which of timm's."""

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

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, Wishes
from mim_refiner.checkpoints.families.keymap import ZEROS, KeyMap, Template
from mim_refiner.checkpoints.families.mae import free_registers
from mim_refiner.checkpoints.families.plain_vit import infer_structure, is_square, make_family
from mim_refiner.errors import CheckpointError, InputError, did_you_mean
from mim_refiner.files import errors_as, read_yaml
from mim_refiner.models.mae import sincos_position_table
from mim_refiner.models.positions import sinusoid_table
from mim_refiner.models.vit import VIT_MODULES
from mim_refiner.reporting import number_of
from mim_refiner.settings import said
from mim_refiner.types import height_width

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
        rows, columns = (side // patch for side, patch in zip(size, weight.shape[-2:], strict=True))
        if positions == "sincos":
            tensors["pos_embed"] = sincos_position_table(weight.shape[0], rows, columns, num_prefix=0)
        else:
            tensors["pos_embed"] = sinusoid_table(rows * columns, weight.shape[0])
    elif table is not None and table.ndim == 3 and "reg_token" in tensors:
        lengths = {table.shape[1] - rest for rest in (0, 1 + tensors["reg_token"].shape[1])}
        if not any(map(is_square, lengths)):
            free_registers(tensors)
