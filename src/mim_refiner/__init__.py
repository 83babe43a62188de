"""Refine masked-image-model encoders with nearest-neighbour alignment (MIM-Refiner, ICLR 2025).

The public names below load on first use, so that ``import mim_refiner`` costs no torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mim_refiner._version import __version__

# torch asks once, at its first large tensor: memory in pages of 2 MiB, where Linux gives them on request. A step's
# activations are a few GB that come anew every step; with small pages the processor spends a tenth of it on addresses.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
    from mim_refiner.commands.analyze import analyze
    from mim_refiner.commands.doctor import doctor
    from mim_refiner.commands.embed import embed
    from mim_refiner.commands.evaluate import evaluate
    from mim_refiner.commands.export import export
    from mim_refiner.commands.pretrain import pretrain
    from mim_refiner.commands.refine import refine
    from mim_refiner.commands.report import report
    from mim_refiner.core.knn import knn_predict
    from mim_refiner.core.layer_decay import layer_decay_scales
    from mim_refiner.core.metrics import clustering_accuracy
    from mim_refiner.core.neighbors import NeighborQueue
    from mim_refiner.core.nna import multi_view_nna_loss, nna_loss
    from mim_refiner.core.schedules import warmup_cosine
    from mim_refiner.errors import MimRefinerError
    from mim_refiner.models.backbone import Backbone
    from mim_refiner.reporting import Reporter
    from mim_refiner.types import BackboneInfo, BlockOutput, CheckpointReport, NeighborResult, NNAOutput

_HOME = {
    "Backbone": "models.backbone",
    "BackboneInfo": "types",
    "BlockOutput": "types",
    "CheckpointReport": "types",
    "MimRefinerError": "errors",
    "NNAOutput": "types",
    "NeighborQueue": "core.neighbors",
    "NeighborResult": "types",
    "Reporter": "reporting",
    "analyze": "commands.analyze",
    "clustering_accuracy": "core.metrics",
    "doctor": "commands.doctor",
    "embed": "commands.embed",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "inspect_checkpoint": "checkpoints.load",
    "knn_predict": "core.knn",
    "layer_decay_scales": "core.layer_decay",
    "load_backbone": "checkpoints.load",
    "multi_view_nna_loss": "core.nna",
    "nna_loss": "core.nna",
    "pretrain": "commands.pretrain",
    "refine": "commands.refine",
    "report": "commands.report",
    "warmup_cosine": "core.schedules",
}

__all__ = [
    "Backbone",
    "BackboneInfo",
    "BlockOutput",
    "CheckpointReport",
    "MimRefinerError",
    "NNAOutput",
    "NeighborQueue",
    "NeighborResult",
    "Reporter",
    "__version__",
    "analyze",
    "clustering_accuracy",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "inspect_checkpoint",
    "knn_predict",
    "layer_decay_scales",
    "load_backbone",
    "multi_view_nna_loss",
    "nna_loss",
    "pretrain",
    "refine",
    "report",
    "warmup_cosine",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps ``mim_refiner.export`` the verb: importing a sub-package of that name would otherwise shadow it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
