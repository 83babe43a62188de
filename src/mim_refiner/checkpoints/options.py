"""Options of loading that stand in a model source, so that every verb takes them: ``FILE::num_heads=4,in_chans=1``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mim_refiner.errors import InputError, did_you_mean

_MARK = "::"
_KNOWN = ("image_size", "num_heads", "in_chans", "encoder", "key_map")


def with_options(source: str, **options: object) -> str:
    """``source`` with the options that are not None written behind it."""
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    if not given:
        return source
    return f"{source}{',' if _MARK in source else _MARK}{','.join(given)}"


def bare_source(source: str) -> str:
    return split_options(source)[0]


def split_options(source: str | Path) -> tuple[str, dict[str, Any]]:
    """(source without options, {option: value}); InputError for an unknown option or an unusable value.

    A file whose name contains the mark is taken literally.
    """
    if not isinstance(source, str | Path):
        raise InputError(
            f"model is of type {type(source).__name__}; give a path, a model name, a timm module or a Backbone"
        )
    text = str(source)
    bare, mark, listed = text.rpartition(_MARK)
    if not mark or "=" not in listed or os.path.exists(text):
        return text, {}
    values: dict[str, Any] = {}
    for item in listed.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in _KNOWN or not equals or not value:
            use = f"use NAME=VALUE with {', '.join(_KNOWN)}"
            raise InputError(f"{text[:200]}: '{item[:80]}' is no option{did_you_mean(name, _KNOWN)}; {use}")
        if name in ("num_heads", "in_chans") and not re.fullmatch(r"0*[1-9]\d{0,5}", value, re.ASCII):
            raise InputError(f"{name} '{value[:40]}': give a whole number from 1 to 999999")
        readers: dict[str, Any] = {"num_heads": int, "in_chans": int, "image_size": parse_size}
        values[name] = readers.get(name, str)(value)
    return bare, values


def parse_size(text: str) -> tuple[int, int]:
    """ "224" or "192x256" (height x width) as a pair; InputError otherwise."""
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text, re.ASCII)
    if match is None:
        raise InputError(f"image_size '{text[:40]}': give one number or HEIGHTxWIDTH, for example 224 or 192x256")
    return int(match[1]), int(match[2] or match[1])
