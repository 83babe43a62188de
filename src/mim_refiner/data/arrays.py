"""NumPy files of others, read without trust: no objects, no size that the file does not hold, no more than memory."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.errors import DataError
from mim_refiner.files import reading

NPY, _ZIP = b"\x93NUMPY", b"PK"
_FIX = "save it again with numpy.save or numpy.savez"
_DEFLATE_LIMIT = 1100  # times smaller than its content is no deflated file


class Arrays(Mapping[str, NDArray[Any]]):
    """The arrays of an .npz or .npy file by name; each is read when asked for, an .npy ("images") is memory-mapped.

    Raises DataError in one line for a file that is damaged, holds objects, or claims more than it has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, zipfile.ZipInfo] = {}
        with reading(path, _FIX), path.open("rb") as file:
            start = file.read(6)
            if start[:2] == _ZIP:
                with zipfile.ZipFile(file) as archive:
                    self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            elif start != NPY:
                raise ValueError("neither an .npz nor an .npy file")
        self.single = not self._members and start == NPY

    def __getitem__(self, name: str) -> NDArray[Any]:
        if self.single and name == "images":
            with reading(self.path, _FIX):
                mapped: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
                return mapped
        info = self._members[name]
        with reading(self.path, _FIX), zipfile.ZipFile(self.path) as archive, archive.open(info) as file:
            if info.file_size > _DEFLATE_LIMIT * info.compress_size + 2**20 or info.compress_type not in (0, 8):
                raise ValueError(f"array '{name}' claims {info.file_size} bytes")
            shape, fortran, dtype = _header(file, info.file_size)
            if info.file_size > physical_memory():
                raise DataError(f"{self.path}: array '{name}' of shape {shape} needs {info.file_size / 1e9:.0f} GB of "
                                "memory; save the images as .npy, which is read piece by piece")  # fmt: skip
            flat = np.empty(info.file_size - file.tell(), np.uint8)
            view, filled = flat.data, 0
            while filled < len(flat):
                count = file.readinto(view[filled:])  # type: ignore[attr-defined]
                if not count:
                    raise ValueError(f"array '{name}' is cut off")
                filled += count
            return _shaped(flat.view(dtype), shape, fortran)

    def __iter__(self) -> Any:
        return iter(["images"] if self.single else self._members)

    def __len__(self) -> int:
        return 1 if self.single else len(self._members)


def array_in(data: bytes | NDArray[Any]) -> NDArray[Any] | None:
    """``data`` where it is an array or a .npy file's content; None for an encoded picture."""
    if isinstance(data, np.ndarray):
        return data
    return read_npy(data) if data[:6] == NPY else None


def read_npy(data: bytes) -> NDArray[Any]:
    """The array in the bytes of a .npy file, without copying; ValueError for objects and for a size that lies."""
    file = io.BytesIO(data)
    shape, fortran, dtype = _header(file, len(data))
    return _shaped(np.frombuffer(data, dtype, offset=file.tell()), shape, fortran)


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, not numbers")
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if count * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of shape {shape} does not fit its file")
    return shape, fortran, dtype


def _shaped(flat: NDArray[Any], shape: tuple[int, ...], fortran: bool) -> NDArray[Any]:
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
