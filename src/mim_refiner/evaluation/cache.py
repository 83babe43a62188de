"""Frozen features on disk: an entry is found again by what it was computed from, never by a name.

One safetensors file an entry, named by the SHA-256 of its identity. Files are written beside their place and renamed,
so any number of runs can share a folder without locks: a reader sees a whole entry or none, two writers of one entry
write the same bytes, and an entry deleted by another run is a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.core.identity import tensors_sha256, weights_sha256
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.source_base import evenly
from mim_refiner.errors import InputError, reason_of
from mim_refiner.files import CACHE_VARIABLE, cache_folder, cache_is_off
from mim_refiner.models.backbone import Backbone

_FORMAT = 1  # raise it when features of the same identity would change
_SAMPLED_IMAGES = 1024  # of a set that does not fit into memory
_STALE_SECONDS = 24 * 3600  # a half-written file of a killed run is removed after this
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass
class FeatureCache:
    """A folder of entries, at most ``max_bytes`` large: the least recently used ones go first.

    ``hits`` and ``misses`` count the look-ups of this object. Errors of the disk never reach the caller: what cannot
    be read is a miss, what cannot be written is left out, and ``problem`` says why.
    """

    folder: Path
    max_bytes: int
    hits: int = 0
    misses: int = 0
    problem: str = field(default="", compare=False)

    @classmethod
    def open(cls, folder: str | Path | None = None, size: str | int | None = None) -> FeatureCache | None:
        """Return the cache in ``folder`` ("off": None), by default in $MIM_REFINER_CACHE or the user's cache folder.

        ``size`` such as "5GB" or bytes; default $MIM_REFINER_CACHE_SIZE, else 5 GB. Raises InputError for a size that
        cannot be read.
        """
        chosen = str(folder or os.environ.get(CACHE_VARIABLE, "").strip() or cache_folder() / "features")
        limit = parse_size(size if size is not None else os.environ.get("MIM_REFINER_CACHE_SIZE") or "5GB")
        return None if cache_is_off(chosen) or limit == 0 else cls(Path(chosen).expanduser(), limit)

    def get(self, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors stored under ``identity``; None when there are none, or when they are damaged."""
        path = self.path_of(identity)
        with contextlib.suppress(OSError, SafetensorError, ValueError, RuntimeError):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                notes = file.metadata() or {}
            if notes.get("sha256") == tensors_sha256(tensors):
                self.hits += 1
                with contextlib.suppress(OSError):
                    os.utime(path)  # most recently used
                return tensors
        self.misses += 1
        return None

    def put(self, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors`` under ``identity`` and make room for them."""
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in stored.values())
        if size > self.max_bytes:
            sizes = f"{size / 1e6:.2f} MB is larger than the whole cache ({self.max_bytes / 1e6:.2f} MB)"
            self.problem = f"an entry of {sizes}"
            return
        path = self.path_of(identity)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        notes = {"identity": json.dumps(identity, sort_keys=True), "sha256": tensors_sha256(stored)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            save_file(stored, temporary, metadata=notes)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            self.problem = f"{self.folder}: cannot write ({reason_of(error)})"
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def path_of(self, identity: Mapping[str, Any]) -> Path:
        """Where the entry of ``identity`` (plain JSON values) lies or would lie."""
        text = json.dumps({**identity, "format": _FORMAT, "version": __version__}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def made_folder(self) -> Path | None:
        """The folder for large files of a moment, made if need be; None where it cannot be."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder if os.access(self.folder, os.W_OK) else None

    def summary(self) -> dict[str, Any]:
        """What to show: {"hits", "misses", "folder"}, and "problem" when something could not be stored."""
        shown = {"hits": self.hits, "misses": self.misses, "folder": str(self.folder)}
        return shown | ({"problem": self.problem} if self.problem else {})

    def _make_room(self, size: int) -> None:
        """Remove the entries used longest ago, and what a killed run left half-written."""
        entries = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another run may have removed it just now
                status = path.stat()
                if path.suffix == ".safetensors":
                    entries.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".tmp" and time.time() - status.st_mtime > _STALE_SECONDS:
                    path.unlink(missing_ok=True)
        total = size + sum(entry[1] for entry in entries)
        for _, bytes_, path in sorted(entries):
            if total <= self.max_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                total -= bytes_


def identity_of(kind: str, backbone: Backbone, images: ImageSet, run: Run, **rest: Any) -> dict[str, Any]:
    """All that features of ``images`` depend on, with ``rest``: what was computed of them.

    What moves last bits alone is left out: the batch size, and whether the last block ran for the class token alone.
    """
    computed = [run.precision, run.device.type, torch.__version__]
    known = {"kind": kind, "model": model_identity(backbone), "data": data_identity(images), "computed": computed}
    return known | rest


def model_identity(backbone: Backbone) -> dict[str, Any]:
    """What the features depend on in an encoder: its weights, and the structure that weights do not tell."""
    info = backbone.info
    structure = hashlib.sha256(repr(backbone.model).encode()).hexdigest()
    return {
        "weights": weights_sha256(backbone.model),
        "structure": structure,
        "architecture": [info.family, info.architecture, info.num_heads, info.depth, list(info.patch_size)],
        "normalisation": [list(info.mean), list(info.std)],
    }


_IDENTITIES: weakref.WeakKeyDictionary[ImageSet, str] = weakref.WeakKeyDictionary()


def data_identity(images: ImageSet) -> str:
    """SHA-256 of what the images show. Labels are no part of it: they are taken from the set, not from the cache.

    A set in memory is hashed pixel by pixel. Of a larger one: the fingerprint (names, sizes), and the encoded bytes
    of 1,024 images spread over it; an image exchanged for another of the same name and size may go unnoticed there.
    """
    if images in _IDENTITIES:
        return _IDENTITIES[images]
    digest = hashlib.sha256(f"{len(images)} {[index for index, *_ in images.unreadable]}".encode())
    if images.array is not None:
        digest.update(f"{images.array.shape}".encode())
        digest.update(images.array.data)
    elif images.cached:
        for index in range(len(images)):
            if (pixels := images.try_load(index)) is not None:
                digest.update(f"{index} {pixels.shape}".encode() + pixels.tobytes())
    else:
        digest.update(images.source.fingerprint().encode())
        for index in evenly(len(images), _SAMPLED_IMAGES).tolist():
            with contextlib.suppress(Exception):  # an unreadable image has no row in the features either
                data = images.source.read(index)
                digest.update(data if isinstance(data, bytes) else data.tobytes())
    return _IDENTITIES.setdefault(images, digest.hexdigest())


def parse_size(size: str | int) -> int:
    """``"5GB"``, ``"500 MB"`` or a number to bytes; InputError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b?)\s*", str(size).lower())
    if not match or match[2] not in _UNITS:
        raise InputError(f"cache size {size!r}: write it like 5GB, 500MB or 0")
    return int(float(match[1]) * _UNITS[match[2]])
