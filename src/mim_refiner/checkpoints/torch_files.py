"""Files of torch.save, zip and legacy: everything they claim is compared with the file before it is used."""

from __future__ import annotations

import mmap
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mim_refiner.checkpoints.held import BrokenPickleError, HeldTensor, Stub
from mim_refiner.checkpoints.pickles import MAX_PICKLE_BYTES, UnsafePickleError, read_legacy, read_pickle
from mim_refiner.errors import CheckpointError, one_line

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"  # first byte of pickle protocol 2 and later
_MAX_MEMBERS = 200_000
_SAVE_AGAIN = "save its tensors alone (a state dict, or safetensors)"
_QUANTISED = re.compile(r"torchao\.[\w.]+|torch\.[\w.]*(\.quantized\.|\bQU?Int\d)[\w.]*")
_DOWNLOAD = "copy or download it again"
_PROGRAMS = (  # endings of members -> what the file is, how its tensors are taken out of it
    (("/constants.pkl",), "a TorchScript program", "torch.jit.load({!r}, 'cpu').state_dict()"),
    (("/archive_format", "serialized_exported_program.json"), "a program of torch.export (.pt2)",
     "torch.export.load({!r}).state_dict"),
)  # fmt: skip


def read_torch_file(path: Path, start: bytes) -> Any:
    """What the torch file at ``path`` holds: plain containers, stubs, and records of tensors that lie in the file.

    ``start``: its first bytes. Raises CheckpointError for a file that is damaged, claims more than it holds, or names a
    class or function that is not on the list of :mod:`mim_refiner.checkpoints.pickles`. Nothing in it is run.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # lives as long as the tensors; read when used
        return read_torch(file, memoryview(data), str(path), start)


def read_torch(file: IO[bytes], data: memoryview, where: str, start: bytes) -> Any:
    """The same of an open ``file`` whose bytes are ``data``; ``where`` names it in messages."""
    try:
        return _read_zip(file, data, where) if start.startswith(ZIP) else read_legacy(data)
    except UnsafePickleError as error:
        quantised = next((name[:80] for name in error.names if _QUANTISED.fullmatch(name)), None)
        if quantised:
            raise CheckpointError(
                f"{where}: holds weights quantised by torch ({quantised}), which are not exact; save the model in "
                "float, as it was before"
            ) from error
        raise CheckpointError(
            f"{where}: holds pickled objects ({error}) that could run code, so it was not loaded; where you trust its "
            f"source, save its tensors alone: {_command(where, error)}"
        ) from error
    except (BrokenPickleError, zipfile.BadZipFile, NotImplementedError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: is damaged or no torch checkpoint ({one_line(error)}); {_DOWNLOAD}") from error


def _command(where: str, error: UnsafePickleError) -> str:
    """The command that saves the tensors of a file with code in it as a state dict."""
    value = error.value
    parts = value if isinstance(value, Mapping) else {}
    modules = {key: held.fields() for key, held in parts.items() if isinstance(held, Stub)}
    whole = [key for key, fields in modules.items() if fields.get("_modules") or fields.get("_parameters")]
    inner = max(parts, key=lambda key: _tensors(parts[key]), default=None)
    if whole:
        taken = f"x[{whole[0]!r}].state_dict()"
    elif inner is not None and _tensors(parts[inner]):
        taken = f"x[{inner!r}]"
    else:
        taken = "x.state_dict()" if isinstance(value, Stub) else "x"
    file = where if re.fullmatch(r"[\w./ +=,:@-]+", where) else "FILE"  # nothing that a shell would read
    load = f"torch.load({file!r}, 'cpu', weights_only=False)"
    if error.plain:
        load = f"__import__('pickle').load(open({file!r}, 'rb'))"
    return f"python -c \"import torch; x = {load}; torch.save({taken}, 'weights.pth')\""


def _tensors(held: Any) -> int:
    return sum(isinstance(item, HeldTensor) for item in held.values()) if isinstance(held, Mapping) else 0


def _read_zip(file: IO[bytes], data: memoryview, where: str) -> Any:
    """Only what torch.save writes: stored members below one folder, whose storages have the sizes the pickle says."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{where}: is a truncated torch file (its end is missing); {_DOWNLOAD}")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise CheckpointError(f"{where}: has {len(members)} members, no checkpoint has so many; {_DOWNLOAD}")
    names = [member.filename for member in members]
    for endings, kind, tensors in _PROGRAMS:
        if any(name.endswith(endings) for name in names):
            raise CheckpointError(
                f'{where}: is {kind}, not weights; save its tensors alone: python -c "import torch; '
                f"torch.save({tensors.format(where)}, 'weights.pth')\""
            )
    found: dict[str, memoryview] = {}
    for member in members:
        _check_member(where, member, found)
        found[member.filename] = _content(data, member)
    if sum(map(len, found.values())) > len(data):
        raise CheckpointError(f"{where}: claims to hold more than its {len(data)} bytes; {_DOWNLOAD}")
    pickles = [name for name in found if name.count("/") == 1 and name.endswith("/data.pkl")]
    root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
    if found and all(name.endswith(".npy") for name in found):
        raise CheckpointError(f"{where}: is a NumPy archive (JAX?); save the weights with torch or safetensors")
    if not root or any(not name.startswith(root) for name in found):
        raise CheckpointError(f"{where}: is a zip file but no torch checkpoint; give the file that torch.save wrote")
    if len(found[pickles[0]]) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where}: its pickle is longer than any checkpoint needs; {_SAVE_AGAIN}")
    if bytes(found.get(f"{root}byteorder", b"little")) == b"big":
        raise CheckpointError(f"{where}: was written on a big-endian machine; save it on a usual one")
    value, storages, _ = read_pickle(bytes(found[pickles[0]]))
    for storage in storages.values():
        content = found.get(f"{root}data/{storage.key}")
        if content is None or len(content) != storage.nbytes:
            held = "is missing" if content is None else f"has {len(content)} bytes"
            raise CheckpointError(f"{where}: storage {storage.key[:20]} of {storage.nbytes} bytes {held}; {_DOWNLOAD}")
        storage.data = content
    return value


def _content(data: memoryview, member: zipfile.ZipInfo) -> memoryview:
    """The bytes of a stored member; BadZipFile where they are not inside the file."""
    start = member.header_offset
    header = bytes(data[start : start + 30])
    if len(header) < 30 or not header.startswith(ZIP):
        raise zipfile.BadZipFile("a member does not begin where the archive says")
    start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = data[start : start + member.file_size]
    if len(content) != member.file_size:
        raise zipfile.BadZipFile("a member is cut off")
    return content


def _check_member(where: str, member: zipfile.ZipInfo, seen: Mapping[str, object]) -> None:
    name = member.filename
    shown = ascii(name)[:80]
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise CheckpointError(f"{where}: member {shown} points out of the archive, so it was not read; {_DOWNLOAD}")
    if name in seen:
        raise CheckpointError(f"{where}: holds {shown} twice, so it is not clear which one counts; {_DOWNLOAD}")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise CheckpointError(f"{where}: member {shown} is compressed, as torch.save never does; {_SAVE_AGAIN}")
    if member.flag_bits & 0x1:
        raise CheckpointError(f"{where}: member {shown} is encrypted; {_SAVE_AGAIN}")
