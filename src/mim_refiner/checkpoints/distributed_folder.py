"""Read a folder of torch.distributed.checkpoint (FSDP, FSDP2, Lightning, DINOv3): ``.metadata`` and its data files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.held import Stub, held_tensor
from mim_refiner.checkpoints.pickles import read_pickle
from mim_refiner.checkpoints.store import Contents, check_inside, check_regular, contents_of
from mim_refiner.checkpoints.torch_files import read_torch
from mim_refiner.errors import CheckpointError
from mim_refiner.files import errors_as

METADATA = ".metadata"
Place = tuple[str, tuple[int, ...]]  # name of a tensor, where a chunk of it begins


def read_distributed(folder: Path) -> Contents:
    """The tensors of the folder, put together from their chunks; the optimiser's are left out unread.

    Raises CheckpointError for a damaged folder. Nothing pickled in it is built, and only links inside it are followed.
    """
    check_inside(folder, folder / METADATA)
    check_regular(folder / METADATA)
    module = "torch.distributed.checkpoint"
    remedy = f"copy it again, or turn it into a file: python -m {module}.format_utils dcp_to_torch FOLDER FILE"
    with errors_as(CheckpointError, f"{folder}: is a damaged folder of {module}", remedy):
        fields = _fields(read_pickle((folder / METADATA).read_bytes())[0])
        tensors, paths = _fields(fields.get("state_dict_metadata")), _fields(fields.get("planner_data"))
        stored = [(_fields(index), _fields(place)) for index, place in _fields(fields.get("storage_data")).items()]
        places = {(index["fqn"], tuple(index.get("offset") or ())): place for index, place in stored}
        found: dict[str, Any] = {}
        for name, about in tensors.items():
            chunks = _fields(about).get("chunks")
            if not isinstance(name, str) or not isinstance(chunks, list) or name.startswith("optim"):
                continue
            path = paths.get(name)
            section, last = (path[:-1], path[-1]) if isinstance(path, tuple) and path else ((), name)
            holder = found
            for part in section:
                holder = holder.setdefault(str(part), {})
            holder[str(last)] = _joined(folder, name, _fields(about).get("size"), chunks, places)
    return contents_of(found, folder)


def _fields(value: Any) -> Mapping[Any, Any]:
    return value.fields() if isinstance(value, Stub) else value if isinstance(value, Mapping) else {}


def _joined(folder: Path, name: str, size: Any, chunks: list[Any], places: Mapping[Place, Mapping[Any, Any]]) -> Tensor:
    """A whole tensor of its chunks, which must fill it: a size that is only claimed takes no memory."""
    parts = []
    for chunk in chunks:
        about = _fields(chunk)
        offset, shape = tuple(about["offsets"]), tuple(about["sizes"])
        part = _chunk(folder, places.get((name, offset)) or places[name, ()])
        if tuple(part.shape) != shape:
            raise ValueError(f"a chunk of {name} has another shape than the metadata says")
        parts.append((offset, part))
    if len(parts) == 1 and tuple(parts[0][1].shape) == tuple(size):
        return parts[0][1]
    if sum(part.numel() for _, part in parts) != math.prod(size):
        raise ValueError(f"the chunks of {name} do not fill it; a part of the folder is missing")
    whole, filled = torch.empty(tuple(size), dtype=parts[0][1].dtype), torch.zeros(tuple(size), dtype=torch.bool)
    for offset, part in parts:
        inside = tuple(slice(first, first + length) for first, length in zip(offset, part.shape, strict=True))
        if part.ndim != whole.ndim or whole[inside].shape != part.shape or bool(filled[inside].any()):
            raise ValueError(f"a chunk of {name} lies outside of it or on another one")
        whole[inside], filled[inside] = part, True
    return whole


def _chunk(folder: Path, place: Mapping[Any, Any]) -> Tensor:
    name, start, length = place["relative_path"], place["offset"], place["length"]
    if place.get("transform_descriptors"):
        raise ValueError("its data are compressed")
    path = folder / name
    check_inside(folder, path)
    check_regular(path)
    if not 0 <= start <= start + length <= path.stat().st_size:
        raise ValueError(f"{name} is cut off")
    with path.open("rb") as file:
        file.seek(start)
        content = bytearray(file.read(length))
    held = held_tensor(read_torch(io.BytesIO(content), memoryview(content), str(path), bytes(content[:9])))
    if held is None:
        raise ValueError(f"{name} holds something else than a tensor")
    return held.tensor()
