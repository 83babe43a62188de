"""The coverage report: what becomes of every tensor of a file, and what every tensor of the model comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mim_refiner.checkpoints.adapters import SAVED_HEAD
from mim_refiner.checkpoints.families import Converted, View
from mim_refiner.checkpoints.store import Contents
from mim_refiner.errors import CheckpointError
from mim_refiner.types import TensorRecord


@dataclass(frozen=True)
class Diagnosis:
    """What loading a source means, tensor by tensor."""

    contents: Contents
    view: View
    family: str
    converted: Converted
    licence: str
    encoders: tuple[str, ...]


def fates(diagnosis: Diagnosis, model: nn.Module) -> tuple[list[TensorRecord], list[str], list[str]]:
    """Return (fate of every tensor, encoder tensors not provided, file tensors without a place).

    Raises CheckpointError for a tensor of the wrong shape.
    """
    converted, section = diagnosis.converted, diagnosis.contents.section(diagnosis.view.section)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources: dict[str, list[str]] = {}
    for name, target in converted.origin.items():
        sources.setdefault(target, []).append(name)
    records, unplaced = [], list(converted.unplaced)
    for target, names in sources.items():
        if target not in expected:
            unplaced.extend(names)
            continue
        shape = tuple(converted.tensors[target].shape)
        if shape != expected[target]:
            raise CheckpointError(
                f"{diagnosis.contents.source}: {names[0]} has shape {list(shape)}, the encoder needs "
                f"{list(expected[target])}; "
                "the file does not fit its config or arguments (patch size, image size, channels)"
            )
        records += [_placed(name, target, tuple(section[name].shape), shape, len(names)) for name in names]
    for name, reason in (converted.dropped | dict.fromkeys(unplaced, "no place in the encoder")).items():
        records.append(TensorRecord(name, tuple(section[name].shape), "dropped", reason=reason))
    for path, tensors in diagnosis.contents.sections.items():
        if path != diagnosis.view.section:
            reason = _why_not(path, diagnosis)
            for name, tensor in tensors.items():
                full = f"{path}.{name}".lstrip(".")
                records.append(TensorRecord(full, tuple(tensor.shape), "dropped", reason=reason))
    missing = [name for name in expected if name not in converted.tensors]
    return records, missing, unplaced


def _placed(name: str, target: str, in_file: tuple[int, ...], shape: tuple[int, ...], parts: int) -> TensorRecord:
    if parts > 1:
        return TensorRecord(name, in_file, "reshaped", target, f"joined with {parts - 1} others to {list(shape)}")
    if in_file != shape:
        return TensorRecord(name, in_file, "reshaped", target, f"from {list(in_file)} to {list(shape)}")
    return TensorRecord(name, in_file, "loaded" if name == target else "renamed", target)


def _why_not(path: str, diagnosis: Diagnosis) -> str:
    first, last = path.split(".")[0], path.split(".")[-1].lstrip("_")
    if path == SAVED_HEAD:
        return "classifier that was trained with the adapter"
    if first.startswith("opt"):
        return "optimiser state"
    if last in diagnosis.encoders:
        return f"another encoder of the file, choose it by --encoder {last}"
    if "loss" in first or first in ("scaler", "amp_scaler", "lr_scheduler", "criterion"):
        return "state of the training"
    return "not part of the encoder"
