"""Checkpoint intake: read safely, tell the family, convert to a timm state dict, load."""

from __future__ import annotations

from mim_refiner.checkpoints.load import PartialCheckpointWarning, inspect_checkpoint, load_backbone

__all__ = ["PartialCheckpointWarning", "inspect_checkpoint", "load_backbone"]
