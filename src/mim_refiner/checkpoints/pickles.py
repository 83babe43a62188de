"""Files of torch.save, zip and legacy, whose pickles are read as data: nothing that one names is built or run.

Everything that they claim is compared with the file before it is used, and tensors lie on the file's own memory.
``torch.load(weights_only=True)`` is not enough here: it reads protocol 2 only, no arrays and no settings of a training
(argparse.Namespace), and allocates what a legacy file claims before it looks at it (torch 2.15). So the standard
library's unpickler decodes the operations (every protocol), and every way from them to code ends in this file: names,
calls, states and storages.
"""

from __future__ import annotations

import _compat_pickle
import io
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from mim_refiner.checkpoints.held import (
    CALLS,
    BrokenPickleError,
    Named,
    Stub,
    check_key,
    is_harmless,
    is_size,
    makes_code,
    numbers,
    storage_type,
)
from mim_refiner.errors import CheckpointError, one_line
from mim_refiner.reporting import number_of

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"  # first byte of pickle protocol 2 and later
_MAX_PICKLE_BYTES = 64 * 2**20  # a ViT-H training state needs about 1 MB
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a legacy file
_LEGACY_PROTOCOL = 1001
_NESTED = "torch.storage._load_from_bytes"  # how pickle itself writes a storage: as bytes of a legacy file
_MAX_READS = 4_000_000  # each costs up to 70 bytes of memory; a training state of 1000 tensors needs about 400,000
_MAX_MEMBERS = 200_000
_SAVE_AGAIN = "save its tensors alone (a state dict, or safetensors)"
_DOWNLOAD = "copy or download it again"
_QUANTISED = re.compile(r"torchao\.[\w.]+|torch\.[\w.]*(\.quantized\.|\bQU?Int\d)[\w.]*")
_PROGRAMS = (  # endings of members -> what the file is, how its tensors are taken out of it
    (("/constants.pkl",), "a TorchScript program", "torch.jit.load({!r}, 'cpu').state_dict()"),
    (("/archive_format", "serialized_exported_program.json"), "a program of torch.export (.pt2)",
     "torch.export.load({!r}).state_dict"),
)  # fmt: skip

Outside = Callable[[str, torch.dtype, int], Tensor]  # numbers [n] of the storage with that key


class UnsafePickleError(Exception):
    """It names things that are not on the list; ``value``: what it holds, inert; ``plain``: torch did not write it."""

    def __init__(self, names: list[str], value: Any = None, *, plain: bool = False) -> None:
        super().__init__(", ".join(name[:80] for name in names[:3]))
        self.names, self.value, self.plain = names, value, plain


class _Counted(io.BytesIO):
    """The pickle's bytes; the number of reads bounds the time and memory that a small pickle can cost."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise BrokenPickleError("its pickle has more operations than any checkpoint needs")
        found = super().read(size)
        if size is not None and len(found) < size:
            raise EOFError
        return found


class _Reader(pickle._Unpickler):
    """The unpickler in plain Python, whose operations can be replaced one by one.

    What a pickle names is :class:`Named`, which takes a call and returns a record; so the operations that call, append
    and build from bytes of their own stay the library's, and fail on anything else.
    """

    stack: list[Any]
    metastack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _Counted, outside: Outside | None, nested: bool) -> None:
        super().__init__(file, encoding="latin1")
        self.outside, self.nested = outside, nested
        self.storages: dict[str, Tensor] = {}
        self.forbidden: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Named:
        if (module, name) in _compat_pickle.NAME_MAPPING:  # of Python 2, which protocol 2 keeps
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        if not is_harmless(full) and (full != _NESTED or self.nested):
            self.forbidden[full] = None
        return Named(full, self.call)

    def persistent_load(self, wanted: Any) -> Any:
        dtype = None
        match wanted:
            case ("module", kind, _, _):  # legacy: a class with its source
                return kind
            case ("storage", kind, str() | int(), _, count, *views) if is_size((count,)):
                dtype = storage_type(kind)
        if dtype is None or self.outside is None:
            raise BrokenPickleError("it refers to something outside that is no storage")
        key = str(wanted[2])
        if key not in self.storages:
            self.storages[key] = self.outside(key, dtype, count)
        storage = self.storages[key].view(dtype)
        if len(storage) != count:
            raise BrokenPickleError(f"storage {key[:20]} is claimed with two sizes")
        match views:
            case [] | [None]:
                return storage
            case [(_, first, length)] if is_size((first, length)) and first + length <= count:
                return storage[first : first + length]
        raise BrokenPickleError("it has a view of a storage that is none")

    def call(self, function: Named, arguments: tuple[Any, ...]) -> Any:
        """What stands for ``function(*arguments)``."""
        if function.name == _NESTED and len(arguments) == 1 and isinstance(arguments[0], bytes):
            return read_legacy(memoryview(bytearray(arguments[0])), nested=True)
        if code := makes_code(function, arguments):
            self.forbidden[code] = None
        known = CALLS.get(function.name)
        return Stub(function.name, arguments) if known is None else known(*arguments)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if not isinstance(self.stack[-1], Named) or not isinstance(arguments, tuple):
            raise BrokenPickleError("it calls something that is no named class")
        self.stack[-1] = self.stack[-1](*arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.build(state)
        elif not isinstance(target, dict | list | Tensor):  # _metadata of a state dict, attributes of a tensor
            raise BrokenPickleError("it sets the state of something that is no object")

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        """Keys and values, one behind the other, into the mapping on top of the stack."""
        if not isinstance(self.stack[-1], dict | list | Stub):
            raise BrokenPickleError("it sets an item of something that has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            self.stack[-1][key] = value

    def load_frame(self) -> None:
        self.read(8)  # only a hint how much to read at once

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    _usual: ClassVar[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_usual) | {
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build, pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem,
        pickle.DICT[0]: load_dict, pickle.FRAME[0]: load_frame, pickle.BYTEARRAY8[0]: load_bytearray8,
        # sets are lists: their members need no hash
        pickle.EMPTY_SET[0]: _usual[pickle.EMPTY_LIST[0]], pickle.ADDITEMS[0]: _usual[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: _usual[pickle.TUPLE[0]],
    }  # fmt: skip
    for _code in (pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        del dispatch[_code[0]]  # no checkpoint needs them


def read_pickle(data: bytes, outside: Outside | None = None, *, nested: bool = False) -> tuple[Any, int]:
    """(value, length) of the pickle at the start of ``data``.

    The value is made of plain containers, text, numbers, tensors on what ``outside`` gives, :class:`Stub` and
    :class:`Named`. Raises UnsafePickleError naming every class or function that is not on the list, BrokenPickleError
    for anything that is no pickle. Nothing is imported or called, and no more memory is taken than the pickle's length
    allows.
    """
    file = _Counted(data[:_MAX_PICKLE_BYTES])
    reader = _Reader(file, outside, nested)
    try:
        value = reader.load()
        if reader.stack or reader.metastack:
            raise BrokenPickleError("its pickle does not hold one thing")
    except Exception as error:  # every kind of damage raises its own; all mean: no whole pickle
        if reader.forbidden:
            raise UnsafePickleError(list(reader.forbidden)) from error
        if isinstance(error, BrokenPickleError | UnsafePickleError):
            raise
        raise BrokenPickleError("its pickle is cut off or damaged") from error
    if reader.forbidden:
        raise UnsafePickleError(list(reader.forbidden), value)
    return value, file.tell()


def read_legacy(data: memoryview, *, nested: bool = False) -> Any:
    """The value of a legacy torch file, or of one pickle alone (arrays, state dicts written by pickle itself).

    A legacy file: five pickles, then the storages, each after its length, to the end of the file. Where they lie is
    known when their pickles were read once. Raises as :func:`read_pickle`. ``nested``: it lies in a pickle, and may
    hold no further one.
    """
    head = bytes(data[:_MAX_PICKLE_BYTES])
    try:
        value, at = read_pickle(head, nested=nested)
    except UnsafePickleError as error:
        raise UnsafePickleError(error.names, error.value, plain=True) from error
    if type(value) is not int or value != _MAGIC:
        if at != len(data) or nested:
            raise BrokenPickleError("it is a pickle that torch did not write")
        return value
    claimed: dict[str, Tensor] = {}

    def claim(key: str, dtype: torch.dtype, count: int) -> Tensor:
        return claimed.setdefault(key, torch.empty(count, dtype=dtype, device="meta"))

    values, starts = [], []
    for _ in range(4):  # protocol, the writer's byte order, the object, the order of the storages
        starts.append(at)
        value, length = read_pickle(head[at:], claim, nested=nested)
        values.append(value)
        at += length
    protocol, _, _, order = values
    if protocol != _LEGACY_PROTOCOL or not isinstance(order, list) or sorted(map(str, order)) != sorted(claimed):
        raise BrokenPickleError("its storages are not those that its pickle names")
    places = {}
    for key in map(str, order):
        end = at + 8 + claimed[key].nbytes
        if end > len(data) or int.from_bytes(data[at : at + 8], "little") != len(claimed[key]):
            raise BrokenPickleError(f"storage {key[:20]} is cut off or has another length than its pickle says")
        places[key], at = data[at + 8 : end], end
    if at != len(data):
        raise BrokenPickleError(f"its tensors need {at} bytes and {len(data)} are there")
    return read_pickle(head[starts[2] :], lambda key, dtype, _: numbers(places[key], dtype), nested=nested)[0]


def read_torch_file(path: Path) -> Any:
    """What the torch file at ``path`` holds: plain containers, stubs, and tensors. Nothing in it is run."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # lives as long as the tensors; read when used
        return read_torch(file, memoryview(data), str(path))


def read_torch(file: IO[bytes], data: memoryview, where: str) -> Any:
    """The same of an open ``file`` whose bytes are ``data``; ``where`` names it in messages."""
    try:
        return _read_zip(file, data, where) if data[:4] == ZIP else read_legacy(data)
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
    except (BrokenPickleError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
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
    return sum(isinstance(item, Tensor) for item in held.values()) if isinstance(held, Mapping) else 0


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
        name, shown = member.filename, ascii(member.filename)[:80]
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise CheckpointError(f"{where}: member {shown} points out of the archive, so it was not read; {_DOWNLOAD}")
        if name in found:
            raise CheckpointError(f"{where}: holds {shown} twice, so it is not clear which one counts; {_DOWNLOAD}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(f"{where}: member {shown} is compressed, as torch.save never does; {_SAVE_AGAIN}")
        if member.flag_bits & 0x1:
            raise CheckpointError(f"{where}: member {shown} is encrypted; {_SAVE_AGAIN}")
        found[name] = _content(data, member)
    if sum(map(len, found.values())) > len(data):
        raise CheckpointError(f"{where}: claims to hold more than its {len(data)} bytes; {_DOWNLOAD}")
    pickles = [name for name in found if name.count("/") == 1 and name.endswith("/data.pkl")]
    root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
    if found and all(name.endswith(".npy") for name in found):
        raise CheckpointError(f"{where}: is a NumPy archive (JAX?); save the weights with torch or safetensors")
    if not root or any(not name.startswith(root) for name in found):
        raise CheckpointError(f"{where}: is a zip file but no torch checkpoint; give the file that torch.save wrote")
    if len(found[pickles[0]]) > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where}: its pickle is longer than any checkpoint needs; {_SAVE_AGAIN}")
    if bytes(found.get(f"{root}byteorder", b"little")) == b"big":
        raise CheckpointError(f"{where}: was written on a big-endian machine; save it on a usual one")

    def stored(key: str, dtype: torch.dtype, count: int) -> Tensor:
        content, wanted = found.get(f"{root}data/{key}"), count * dtype.itemsize
        if content is None or len(content) != wanted:
            held = "is missing" if content is None else f"has {number_of(len(content), 'bytes')}"
            raise BrokenPickleError(f"storage {key[:20]} of {wanted} bytes {held}")
        return numbers(content, dtype)

    return read_pickle(bytes(found[pickles[0]]), stored)[0]


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
