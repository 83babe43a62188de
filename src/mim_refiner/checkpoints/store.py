"""Read checkpoint files safely: safetensors, or torch files without running any code they may carry."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.errors import CheckpointError

_PICKLE = b"\x80"  # first byte of pickle protocol 2 and later
_ZIP = b"PK\x03\x04"
# Parts of names that DDP, torch.compile, FSDP and activation checkpointing put in.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# The one class beyond torch's own list that a file may hold: MAE's training files keep their options in it. It is a
# plain attribute container. Add to this tuple only classes whose construction cannot have effects.
_SAFE_CLASSES = (argparse.Namespace,)


@dataclass(frozen=True)
class Contents:
    """All tensors of a checkpoint, grouped by the mapping that holds them.

    ``sections``: path of a mapping inside the file ("" for the top level, "model", "optimizer.state.0") to its
    {name as in the file: tensor}. ``config``: the config.json beside the weights, if any. ``numbers``: the whole
    numbers in the file by path ("cfg.model.num_heads").
    """

    source: str
    sections: dict[str, dict[str, Tensor]]
    config: Mapping[str, Any] | None = None
    numbers: Mapping[str, int] = field(default_factory=dict)

    def section(self, path: str) -> dict[str, Tensor]:
        return self.sections.get(path, {})

    def number(self, name: str) -> int:
        """The whole number whose path ends in ``name``; 0 if there is none, or several that differ."""
        found = {value for path, value in self.numbers.items() if path.split(".")[-1] == name}
        return found.pop() if len(found) == 1 else 0


def read_checkpoint(path: Path, *, config: Mapping[str, Any] | None = None) -> Contents:
    """Read every tensor of the file at ``path`` (kind told from its first bytes, not from its name).

    Raises CheckpointError for a file that is missing, empty, truncated, no checkpoint, holds no tensor, or holds
    pickled objects other than plain data; such objects are never built.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); check path and permissions"
        ) from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty; copy or download it again")
    payload = _read_torch(path, start) if start.startswith((_ZIP, _PICKLE)) else _read_safetensors(path, start)
    sections = {where: dict(tensors) for where, tensors in _sections(payload, "")}
    if not sections:
        raise CheckpointError(f"{path}: holds no tensors; give a file with a model's weights")
    return Contents(source=str(path), sections=sections, config=config, numbers=dict(_numbers(payload, "")))


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config.json of ``folder`` as a dict; CheckpointError if missing or no JSON object."""
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: the folder has no config.json; give a timm folder, a finished run, or the weight file"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no readable JSON ({one_line(error)}); download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object with an 'architecture'; write or download it again")
    return config


def strip_wrappers(name: str) -> str:
    """``name`` without the parts that DDP, torch.compile, FSDP and activation checkpointing put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def one_line(error: object, limit: int = 160) -> str:
    """The start of an error's text on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _read_safetensors(path: Path, start: bytes) -> Any:
    looks_right = len(start) == 9 and start[8:9] == b"{"
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        if looks_right:
            message = f"is a damaged or truncated safetensors file ({one_line(error)}); copy or download it again"
        else:
            message = "is not a checkpoint; give a .safetensors file, or a .pth/.pt/.bin file written by torch.save"
        raise CheckpointError(f"{path}: {message}") from error


def _read_torch(path: Path, start: bytes) -> Any:
    if start.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: is a truncated torch file (its end is missing); copy or download it again")
    try:
        # An open file, because for a path torch may choose the reader by the file's ending.
        with path.open("rb") as file, torch.serialization.safe_globals(list(_SAFE_CLASSES)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_explain_unpickling(error)}") from error
    except Exception as error:  # torch raises many kinds for damaged files, and all mean the same here
        raise CheckpointError(
            f"{path}: is damaged, truncated or no torch checkpoint ({one_line(error, 100)}); download it again"
        ) from error


def _explain_unpickling(error: Exception) -> str:
    text = str(error)
    match = re.search(r"GLOBAL (\S+)", text) or re.search(r"[Cc]lass(?:es)? (\S+)", text)
    if match or "weights_only" in text or "Unsupported" in text:
        what = f" ({match.group(1)})" if match else ""
        return f"holds pickled objects{what} that could run code, so it was not loaded; save its tensors alone"
    return f"is damaged or not a torch checkpoint ({one_line(text, 100)}); copy or download it again"


def _sections(value: Any, path: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All mappings (and lists) inside ``value`` that hold tensors directly, with their paths."""
    if isinstance(value, Tensor):
        yield path, {"tensor": value}
        return
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return
    tensors = {str(key): item for key, item in value.items() if isinstance(item, Tensor)}
    if tensors:
        yield path, tensors
    for key, item in value.items():
        if not isinstance(item, Tensor):
            yield from _sections(item, f"{path}.{key}" if path else str(key))


def _numbers(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """The whole numbers inside nested mappings, with their paths; those of an optimiser are of no use."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if not isinstance(item, Tensor) and not str(key).startswith("optim"):
            yield from _numbers(item, f"{path}.{key}" if path else str(key))
