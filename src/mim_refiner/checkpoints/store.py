"""Read checkpoint files safely: safetensors, or torch files without running any code they may carry."""

from __future__ import annotations

import argparse
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.checkpoints.torch_files import PICKLE, ZIP, read_torch_file
from mim_refiner.errors import CheckpointError

# Parts of names that DDP, torch.compile, FSDP and activation checkpointing put in.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"Rar!": "rar"}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_CONTAINERS = 200_000
_MAX_DEPTH = 32
_SHARED_SLACK = 64 * 2**20  # tensors may share memory in a file, but not so that it grows without bound


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

    ``config`` says that the file is part of a folder; a link that leads out of it is then refused. Raises
    CheckpointError for a file that is missing, no regular file, empty, truncated, no checkpoint, claims more than it
    holds, holds no tensor, or holds pickled objects other than plain data; such objects are never built.
    """
    if config is not None:
        check_inside(path.parent, path)
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty; copy or download it again")
    # The length of a safetensors header may begin with a pickle's first byte, so the brace after it is looked at first.
    is_torch = start.startswith((ZIP, PICKLE)) and start[8:9] != b"{"
    payload = read_torch_file(path, start) if is_torch else _read_safetensors(path, start)
    sections: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, int] = {}
    for where, held in _mappings(payload, str(path)):
        tensors = {str(key): item for key, item in held.items() if isinstance(item, Tensor)}
        if tensors:
            sections[where] = tensors
        if not where.startswith("optim"):
            numbers |= {f"{where}.{key}".lstrip("."): item for key, item in held.items() if type(item) is int}
    if not sections:
        raise CheckpointError(f"{path}: holds no tensors; give a file with a model's weights")
    _check_tensors(path, sections)
    return Contents(source=str(path), sections=sections, config=config, numbers=numbers)


def check_regular(path: Path) -> None:
    """CheckpointError unless ``path`` (links followed) is a regular file: a pipe would block, a device never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: is a folder, not a file; give the weight file, or a folder with a config.json")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is a pipe, socket or device, not a file; copy its content to a file first")


def check_inside(folder: Path, path: Path) -> None:
    """CheckpointError when a link leads from ``path`` out of ``folder``.

    The hub's cache is the exception: its snapshot folders link to the blobs beside them.
    """
    try:
        target = path.resolve(strict=True)
        roots = [folder.resolve(strict=True)]
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to nothing; copy the file into the folder") from None
        return  # a missing file is reported by who needs it
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path}: is a link that leads out of its folder (to {target}), so it was not read; copy the file into the "
            "folder, or give its own path"
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or one_line(error, 80)
    return CheckpointError(f"{one_line(path, 400)}: cannot be read ({reason}); check path and permissions")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config.json of ``folder`` as a dict; CheckpointError if missing or no JSON object."""
    path = folder / name
    check_inside(folder, path)
    try:
        if path.exists():
            check_regular(path)
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise CheckpointError(f"{path}: is larger than any config.json; download it again")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: the folder has no config.json; give a timm folder, a finished run, or the weight file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
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
    packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
    if packed:
        raise CheckpointError(f"{path}: is packed with {packed}; unpack it first")
    if not (len(start) == 9 and start[8:9] == b"{"):
        raise CheckpointError(
            f"{path}: is not a checkpoint; give a .safetensors file, or a .pth/.pt/.bin file written by torch.save"
        )
    try:
        _check_header(path, int.from_bytes(start[:8], "little"))
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is a damaged or truncated safetensors file ({one_line(error)}); copy or download it again"
        ) from error


def _check_header(path: Path, length: int) -> None:
    """ValueError when the header is longer than the file or names a tensor twice; the library checks the rest."""
    size = path.stat().st_size
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    with path.open("rb") as file:
        file.seek(8)
        json.loads(file.read(length), object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return dict(pairs)


def _check_tensors(path: Path, sections: Mapping[str, Mapping[str, Tensor]]) -> None:
    """CheckpointError for tensors that are not plain numbers in memory, or that unfold to far more than the file."""
    total = 0
    for where, tensors in sections.items():
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                full = f"{where}.{name}".lstrip(".")
                raise CheckpointError(f"{path}: {full} is no plain dense tensor; save it as one")
            total += tensor.numel() * tensor.element_size()
    size = path.stat().st_size
    if total > 4 * size + _SHARED_SLACK:
        raise CheckpointError(
            f"{path}: its tensors unfold to {total} bytes from a file of {size}, so they were not loaded; save them "
            "with .contiguous()"
        )


def _mappings(payload: Any, source: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All mappings, lists and option objects inside ``payload`` as mappings, with their paths; outer ones first."""
    waiting: list[tuple[Any, str, int]] = [({"tensor": payload} if isinstance(payload, Tensor) else payload, "", 0)]
    for _ in range(_MAX_CONTAINERS):
        if not waiting:
            return
        value, path, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            break
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if not isinstance(value, Mapping):
            continue
        yield path, value
        inner = [
            (item, f"{path}.{key}" if path else str(key), depth + 1) for key, item in value.items() if _may_hold(item)
        ]
        waiting.extend(reversed(inner))
    # A list that holds itself, or two lists that hold each other twice, would never end.
    raise CheckpointError(f"{source}: is nested without end; save a plain state dict")


def _may_hold(item: Any) -> bool:
    return isinstance(item, Mapping | list | tuple | argparse.Namespace)
