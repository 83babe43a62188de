"""Write encoders in formats that other programs load."""

from __future__ import annotations

from mim_refiner.export.model_card import model_card
from mim_refiner.export.timm import export_timm

__all__ = ["export_timm", "model_card"]
