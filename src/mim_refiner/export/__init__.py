"""Write encoders in formats that other programs load."""

from __future__ import annotations

from mim_refiner.export.hub import push_to_hub
from mim_refiner.export.model_card import model_card
from mim_refiner.export.parity import CheckImages
from mim_refiner.export.timm import export_timm
from mim_refiner.export.writing import write_export

__all__ = ["CheckImages", "export_timm", "model_card", "push_to_hub", "write_export"]
