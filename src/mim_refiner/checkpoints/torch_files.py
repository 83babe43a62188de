"""Files of torch.save, zip and legacy: everything they claim is compared with the file before torch reads it."""

from __future__ import annotations

import io
import mmap
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from mim_refiner.checkpoints.pickles import (
    MAX_PICKLE_BYTES,
    STAND_INS,
    BrokenPickleError,
    Storage,
    UnsafePickleError,
    scan_pickle,
)
from mim_refiner.errors import CheckpointError

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"  # first byte of pickle protocol 2 and later
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a legacy file
_LEGACY_PROTOCOL = 1001
_MAX_MEMBERS = 200_000
_SAVE_AGAIN = "save its tensors alone (a state dict, or safetensors)"
_DOWNLOAD = "copy or download it again"


def read_torch_file(path: Path, start: bytes) -> Any:
    """What the torch file at ``path`` holds, on the CPU; ``start`` is its first bytes.

    Raises CheckpointError for a file that is damaged, claims more than it holds, or names a class or function that is
    not on the list of :mod:`mim_refiner.checkpoints.pickles`; nothing in it is run and nothing big allocated before.
    """
    try:
        if start.startswith(ZIP):
            _check_zip(path)
        else:
            _check_legacy(path)
        # An open file, because for a path torch may choose the reader by the file's ending.
        with path.open("rb") as file, torch.serialization.safe_globals(STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path}: holds pickled objects ({error}) that could run code, so it was not loaded; {_SAVE_AGAIN}"
        ) from error
    except BrokenPickleError as error:
        raise CheckpointError(f"{path}: is damaged or no torch checkpoint ({error}); {_DOWNLOAD}") from error
    except Exception as error:  # torch raises many kinds for damaged files, and all mean the same here
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(
            f"{path}: is damaged, truncated or no torch checkpoint ({reason}); {_DOWNLOAD}"
        ) from error


def _check_zip(path: Path) -> None:
    """Only what torch.save writes: stored members below one folder, whose storages have the sizes the pickle says."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: is a truncated torch file (its end is missing); {_DOWNLOAD}")
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise CheckpointError(f"{path}: has {len(members)} members, no checkpoint has so many; {_DOWNLOAD}")
        sizes: dict[str, int] = {}
        for member in members:
            _check_member(path, member, sizes)
            sizes[member.filename] = member.file_size
        if sum(sizes.values()) > size:
            raise CheckpointError(f"{path}: claims to hold {sum(sizes.values())} bytes in {size}; {_DOWNLOAD}")
        pickles = [name for name in sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
        if not root or any(not name.startswith(root) for name in sizes):
            raise CheckpointError(f"{path}: is a zip file but no torch checkpoint; give the file that torch.save wrote")
        if f"{root}constants.pkl" in sizes:
            raise CheckpointError(f"{path}: is a TorchScript program, not weights; {_SAVE_AGAIN}")
        if sizes[pickles[0]] > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: its pickle is longer than any checkpoint needs; {_SAVE_AGAIN}")
        _, storages = scan_pickle(io.BytesIO(archive.read(pickles[0])))
        for storage in storages:
            found = sizes.get(f"{root}data/{storage.key}")
            if found != storage.nbytes:
                held = "is missing" if found is None else f"has {found} bytes"
                raise CheckpointError(
                    f"{path}: storage {storage.key[:20]} should have {storage.nbytes} bytes and {held}; {_DOWNLOAD}"
                )


def _check_member(path: Path, member: zipfile.ZipInfo, seen: dict[str, int]) -> None:
    name = member.filename
    shown = ascii(name)[:80]
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise CheckpointError(f"{path}: member {shown} points out of the archive, so it was not read; {_DOWNLOAD}")
    if name in seen:
        raise CheckpointError(f"{path}: holds {shown} twice, so it is not clear which one counts; {_DOWNLOAD}")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise CheckpointError(
            f"{path}: member {shown} is compressed ({member.compress_size} bytes for {member.file_size}), torch.save "
            f"never does that; {_SAVE_AGAIN}"
        )
    if member.flag_bits & 0x1:
        raise CheckpointError(f"{path}: member {shown} is encrypted; {_SAVE_AGAIN}")


def _check_legacy(path: Path) -> None:
    """Five pickles, then the storages: each is preceded by its length, and together they fill the file exactly."""
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path}: is a tar file, which only torch before 0.1.10 wrote; {_SAVE_AGAIN}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages = _scan_legacy(path, data)
        wanted = sum(storage.nbytes + 8 for storage in storages)
        held = len(data) - data.tell()
        if wanted != held:
            raise CheckpointError(
                f"{path}: its tensors need {wanted} bytes and {held} are there, it is truncated or damaged; {_DOWNLOAD}"
            )


def _scan_legacy(path: Path, data: IO[bytes] | Any) -> list[Storage]:
    values = []
    for _ in range(2):
        value, _storages = scan_pickle(data)
        values.append(value)
    if values != [_MAGIC, _LEGACY_PROTOCOL]:
        raise CheckpointError(f"{path}: is a pickle but no torch checkpoint, so it was not loaded; {_SAVE_AGAIN}")
    scan_pickle(data)  # the writer's byte order and type sizes
    _, storages = scan_pickle(data)
    scan_pickle(data)  # the order of the storages
    return storages
