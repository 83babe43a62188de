"""One file per source format. To add a format: write its file with a ``FAMILY`` and list it below."""

from __future__ import annotations

from mim_refiner.checkpoints.families import mae, timm_format
from mim_refiner.checkpoints.families.base import Converted, Family, Wishes

# Asked in this order: the most specific first, timm's own names last.
FAMILIES: tuple[Family, ...] = (mae.FAMILY, timm_format.FAMILY)

__all__ = ["FAMILIES", "Converted", "Family", "Wishes"]
