"""Families whose encoder is a plain ViT: what they share, and what each one says beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import DROPPED, PROJECTION, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import VIT_NAMES, infer_structure
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD
from mim_refiner.types import BackboneInfo

# (view, tensors under timm's names, wishes) -> what the file says; may change the tensors, and take some out.
Prepare = Callable[[View, dict[str, Tensor], Wishes], dict[str, Any]]
_TO_STRUCTURE = ("final_norm", "known_heads", "known_size")


def vit_family(
    name: str,
    matches: Callable[[View], bool],
    *,
    keys: KeyMap = VIT_NAMES,
    anchor: str = PROJECTION,
    dropped: Mapping[str, str] | None = None,
    prepare: Prepare | None = None,
    to_source: Callable[[Mapping[str, Tensor], BackboneInfo], dict[str, Tensor]] | None = None,
    default_encoder: tuple[str, ...] = (),
    heads: Mapping[int, int] | None = None,
    **facts: Any,
) -> Family:
    """A family of plain ViTs.

    ``keys``: its names. ``dropped``: start of a name -> why the encoder does not take it, beside DROPPED. ``heads``:
    those of the authors' models by width, where other ViTs of that width have others. ``facts``: fields of
    :class:`Converted` (ImageNet's mean and std and the rule "bicubic" by default), or ``final_norm``, ``known_heads``,
    ``known_size`` of :func:`infer_structure`; those that depend on the file come from ``prepare``.
    """

    def convert(view: View, wishes: Wishes) -> Converted:
        mapped = keys.to_timm(view.tensors)
        said = facts | (prepare(view, mapped.tensors, wishes) if prepare else {})
        out = tuple(name for name, target in mapped.origin.items() if target not in mapped.tensors)
        origin = {name: target for name, target in mapped.origin.items() if name not in out}
        mapped = replace(mapped, origin=origin, rest=mapped.rest + out)
        structure = {key: said.pop(key) for key in _TO_STRUCTURE if key in said}
        if heads and PROJECTION in mapped.tensors and wishes.told_heads < 1:
            structure.setdefault("known_heads", heads.get(mapped.tensors[PROJECTION].shape[0], 0))
        vit = infer_structure(mapped.tensors, wishes, view.where, **structure)
        notes = vit.notes + tuple(said.pop("notes", ()))
        arguments = vit.arguments | said.pop("arguments", {})
        defaults = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "position_rule": "bicubic"}
        return Converted(
            said.pop("architecture", vit.architecture),
            arguments,
            vit.num_heads,
            **account(view, mapped, {**(dropped or {}), **DROPPED}),
            **(defaults | said),
            notes=notes,
        )

    return Family(name, anchor, matches, convert, to_source, default_encoder=default_encoder)
