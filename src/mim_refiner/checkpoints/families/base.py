"""What a checkpoint family provides, and how its tensors are handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.store import Contents


@dataclass(frozen=True)
class Wishes:
    """What the caller asked for; None = as in the file."""

    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    in_chans: int | None = None


@dataclass(frozen=True)
class Converted:
    """A checkpoint in timm's terms.

    ``num_heads`` 0 = the file does not tell. ``architecture`` and ``arguments`` go to ``create_vit``; they describe
    the encoder as it is in the file (its own image size and channels).
    """

    architecture: str
    arguments: dict[str, Any]
    num_heads: int
    tensors: dict[str, Tensor]  # timm name -> value
    origin: dict[str, str]  # timm name -> name in the file
    dropped: dict[str, str]  # name in the file -> why the encoder does not take it
    unplaced: tuple[str, ...] = ()  # names in the file that this family does not know
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    licence: str | None = None  # None = the family's
    family: str | None = None  # a family that the file names itself
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Family:
    """A source format: how to recognise it by keys and shapes, and how to turn it into a timm state dict."""

    name: str
    find_section: Callable[[Contents], str | None]  # path of the section with the encoder, None = not this family
    convert: Callable[[Contents, str, Wishes], Converted]
