"""Checkpoint intake: read safely, tell the family, convert to a timm state dict, load.

The names below load on first use: the catalogue beside them needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mim_refiner.checkpoints.load import PartialCheckpointWarning, inspect_checkpoint, load_backbone

__all__ = ["PartialCheckpointWarning", "inspect_checkpoint", "load_backbone"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mim_refiner.checkpoints import load

    return getattr(load, name)
