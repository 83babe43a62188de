"""Read pickles as data: whatever class or function one names becomes an inert record, and nothing of it runs.

``torch.load(weights_only=True)`` is not enough here: it knows protocol 2 only, no sets and no subclasses of dict, and
allocates what the pickle claims before it looks at the file. So the standard library's unpickler decodes the operations
(every protocol), and every way from them to code ends in this file: names, calls, states and storages.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from mim_refiner.checkpoints.held import (
    CALLS,
    BrokenPickleError,
    HeldTensor,
    Named,
    Storage,
    Stub,
    check_key,
    is_harmless,
    is_size,
    makes_code,
    storage_type,
)

MAX_PICKLE_BYTES = 64 * 2**20  # a ViT-H training state needs about 1 MB
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a legacy file
_LEGACY_PROTOCOL = 1001
_NESTED = "torch.storage._load_from_bytes"  # how pickle itself writes a storage: as bytes of a legacy file
_MAX_READS = 4_000_000  # each costs up to 70 bytes of memory; a training state of 1000 tensors needs about 400,000


class UnsafePickleError(Exception):
    """The pickle names classes or functions (``names``) that are not on the list.

    ``value``: what it holds, inert. ``plain``: torch did not write the file.
    """

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

    def __init__(self, file: _Counted, *, nested: bool = False) -> None:
        super().__init__(file, encoding="latin1")
        self.nested = nested
        self.storages: dict[str, Storage] = {}
        self.forbidden: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Named:
        if (module, name) in _compat_pickle.NAME_MAPPING:  # of Python 2, which protocol 2 keeps
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        if not is_harmless(full) and (full != _NESTED or self.nested):
            self.forbidden[full] = None
        return Named(full, self.call)

    def persistent_load(self, wanted: Any) -> Any:
        if isinstance(wanted, tuple) and len(wanted) == 4 and wanted[0] == "module":  # legacy: a class with its source
            return wanted[1]
        if not (isinstance(wanted, tuple) and len(wanted) in (5, 6) and wanted[0] == "storage"):
            raise BrokenPickleError("it refers to something outside that is no storage")
        _, kind, key, _, count = wanted[:5]
        dtype = storage_type(kind)
        key = str(key) if type(key) is int else key
        if dtype is None or not isinstance(key, str) or not is_size((count,)):
            raise BrokenPickleError("it refers to something outside that is no storage")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if storage.nbytes != count * dtype.itemsize:
            raise BrokenPickleError(f"storage {key[:20]} is claimed with two sizes")
        view = wanted[5] if len(wanted) == 6 else None
        if view is None:
            return storage
        if not (isinstance(view, tuple) and len(view) == 3 and is_size(view[1:]) and sum(view[1:]) <= count):
            raise BrokenPickleError("it has a view of a storage that is none")
        return Storage(str(view[0]), dtype, view[2], view=(storage, view[1]))

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
            target.state = state
        elif not isinstance(target, dict | list | HeldTensor):  # _metadata of a state dict, attributes of a tensor
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


def read_pickle(data: bytes, *, nested: bool = False) -> tuple[Any, dict[str, Storage], int]:
    """(value, storages by key, length) of the pickle at the start of ``data``.

    The value is made of plain containers, text, numbers, and :class:`HeldTensor`, :class:`Stub`, :class:`Named`.
    Raises UnsafePickleError naming every class or function that is not on the list, BrokenPickleError for anything that
    is no pickle. Nothing is imported or called, and no more memory is taken than the pickle's length allows.
    """
    file = _Counted(data[:MAX_PICKLE_BYTES])
    reader = _Reader(file, nested=nested)
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
    return value, reader.storages, file.tell()


def read_legacy(data: memoryview, *, nested: bool = False) -> Any:
    """The value of a legacy torch file, or of one pickle alone (arrays, state dicts written by pickle itself).

    A legacy file: five pickles, then the storages, each after its length, to the end of the file. Raises as
    :func:`read_pickle`. ``nested``: it lies in a pickle, and may hold no further one.
    """
    head = bytes(data[:MAX_PICKLE_BYTES])
    try:
        value, _, at = read_pickle(head, nested=nested)
    except UnsafePickleError as error:
        raise UnsafePickleError(error.names, error.value, plain=True) from error
    if value != _MAGIC:
        if at != len(data) or nested:
            raise BrokenPickleError("it is a pickle that torch did not write")
        return value
    values: list[Any] = []
    storages: dict[str, Storage] = {}
    for _ in range(4):  # protocol, the writer's byte order, the object, the order of the storages
        value, found, length = read_pickle(head[at:], nested=nested)
        values.append(value)
        storages |= found
        at += length
    protocol, _, payload, order = values
    if protocol != _LEGACY_PROTOCOL or not isinstance(order, list) or sorted(map(str, order)) != sorted(storages):
        raise BrokenPickleError("its storages are not those that its pickle names")
    for key in order:
        at = _place(storages[str(key)], data, at)
    if at != len(data):
        raise BrokenPickleError(f"its tensors need {at} bytes and {len(data)} are there")
    return payload


def _place(storage: Storage, data: memoryview, at: int) -> int:
    """Give ``storage`` its bytes, which begin with their number of items; returns where they end."""
    end = at + 8 + storage.nbytes
    if end > len(data) or int.from_bytes(data[at : at + 8], "little") != storage.count:
        raise BrokenPickleError(f"storage {storage.key[:20]} is cut off or has another length than its pickle says")
    storage.data = data[at + 8 : end]
    return end
