"""The side folder of an embedding run: finished parts, each complete or absent, and what they belong to."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mim_refiner import files
from mim_refiner.errors import RunFolderError
from mim_refiner.files import json_value, reading, write_bytes, write_json

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Part:
    """Rows of a stretch of the data: features [n, ...] (None when no image of it could be read), image numbers [n]."""

    features: NDArray[Any] | None
    indices: NDArray[np.int64]


class PartFolder:
    """``<out>.parts/``: settings.json and part-000000.safetensors, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Create the folder, or continue one of the same ``settings``; True when it is continued.

        Raises RunFolderError, with the difference, for parts of other settings.
        """
        if overwrite:
            self.remove()
        if self.path.exists() and any(self.path.iterdir()):
            refuse_difference(self.path, read_json(self.path / _SETTINGS), settings)
            return True
        write_json(self.path / _SETTINGS, settings)
        return False

    def has(self, number: int) -> bool:
        """Whether this part is finished. A damaged file counts as missing."""
        try:
            with safe_open(self._file(number), framework="numpy") as file:
                return "indices" in file.keys()  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return False

    def write(self, number: int, part: Part, unreadable: list[tuple[int, str, str]]) -> None:
        arrays = {"indices": part.indices} | ({} if part.features is None else {"features": part.features})
        write_bytes(self._file(number), save(arrays, {"unreadable": json.dumps(unreadable)}))

    def read(self, number: int) -> Part:
        with self._opened(number) as file:
            features = file.get_tensor("features") if "features" in file.keys() else None  # noqa: SIM118
            return Part(features, file.get_tensor("indices"))

    def indices(self, number: int) -> NDArray[np.int64]:
        with self._opened(number) as file:
            indices: NDArray[Any] = file.get_tensor("indices")
            return indices

    def unreadable(self, number: int) -> list[tuple[int, str, str]]:
        """(index, name, reason) of the images of this part that could not be read."""
        with self._opened(number) as file:
            return [(int(index), name, reason) for index, name, reason in json.loads(file.metadata()["unreadable"])]

    def all(self) -> Iterator[Part]:
        """The parts in order, one in memory at a time."""
        for number in range(self.count()):
            yield self.read(number)

    def count(self) -> int:
        """Number of parts written (all of them, once the computation is over)."""
        return sum(1 for _ in self.path.glob("part-*.safetensors"))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        path = self._file(number)
        with reading(path, f"delete the folder {self.path} and run again"), safe_open(path, framework="numpy") as file:
            yield file

    def _file(self, number: int) -> Path:
        return self.path / f"part-{number:06d}.safetensors"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no readable one."""
    try:
        value = files.read_json(path)
    except Exception:  # a damaged file is as good as none
        return None
    return value if isinstance(value, dict) else None


def refuse_difference(path: Path, stored: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Raise RunFolderError naming what differs between the features at ``path`` and those asked for."""
    if stored is None:
        raise RunFolderError(f"{path}: is not the work of embed; choose another --out, or --overwrite to replace it")
    wanted = json_value(settings)
    changed = [key for key in wanted if stored.get(key) != wanted[key]]
    if changed:
        difference = "; ".join(f"{key}: {stored.get(key)} there, {wanted[key]} now" for key in changed[:3])
        raise RunFolderError(
            f"{path}: holds features made with other settings ({difference}); "
            "choose another --out, or --overwrite to start anew"
        )
