"""Read a pickle as data: which classes it names and which storages it wants, without building anything.

A torch file carries a pickle. ``torch.load(weights_only=True)`` builds only listed classes, but it allocates what the
pickle claims before it looks at the data, and some of its listed callables can be made to allocate or compute without
end. So the pickle is walked first, on symbols instead of objects: only the operations and classes that real checkpoints
use pass, every claimed storage is reported for comparison with the file, and dictionary keys are plain text or numbers.
"""

from __future__ import annotations

import argparse
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar

_ITEM_BYTES = {
    "DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "FloatStorage": 4, "IntStorage": 4,
    "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2, "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1,
}  # fmt: skip
_STORAGES = {f"torch.{name}": size for name, size in _ITEM_BYTES.items()} | {"torch.storage.UntypedStorage": 1}
_DTYPES = {
    f"torch.{name}"
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32",
        "uint64", "bool", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
_CALLABLES = {
    "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "argparse.Namespace",
    "yacs.config.CfgNode", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "_codecs.encode", "torch.Size", "torch.device", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
}  # fmt: skip
_BUILTIN_TYPES = {"builtins.dict", "builtins.list", "builtins.int", "builtins.float"}  # factories of a defaultdict
_PRIMITIVE = (str, bytes, int, float, bool, type(None))
MAX_PICKLE_BYTES = 64 * 2**20  # a ViT-H training state needs about 1 MB


class UnsafePickleError(Exception):
    """The pickle names what no checkpoint needs; ``names`` are the classes and functions."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class BrokenPickleError(Exception):
    """The bytes are no complete pickle of the kind that torch.save writes."""


@dataclass(frozen=True)
class Storage:
    """A block of numbers that the pickle says the file holds."""

    key: str
    nbytes: int


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Made:
    """Stands for an object: the class or function that makes it."""

    name: str


def _numpy_number(dtype: Any, data: Any = b"") -> float | int | bool:
    """The Python number of a pickled NumPy scalar; nothing of NumPy runs."""
    return struct.unpack(f"<{dtype.code}", data)[0]


class _NumpyDtype:
    """The little that a pickled numeric dtype says."""

    _CODES: ClassVar = {
        "f8": "d",
        "f4": "f",
        "f2": "e",
        "i8": "q",
        "i4": "i",
        "i2": "h",
        "i1": "b",
        "u1": "B",
        "b1": "?",
    }

    def __init__(self, text: str, align: bool = False, copy: bool = True) -> None:
        self.code = self._CODES[text]

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("only little-endian NumPy scalars are read")


def _plain_dict(*_: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


# What torch.load may build beyond its own list, under the name in the file. MAE's training files keep their options in
# a Namespace, SimMIM's in a CfgNode (a dict); losses are now and then NumPy scalars. None of NumPy's or yacs's own code
# is called: the stand-ins are plain containers and numbers.
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (_plain_dict, "collections.defaultdict"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
    (_NumpyDtype, "numpy.dtype"),
    *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, int, float)),
]


@dataclass
class _Machine:
    """The pickle machine on symbols."""

    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    forbidden: list[str] = field(default_factory=list)

    def step(self, name: str, argument: Any) -> None:
        """Carry out one operation; raises BrokenPickleError for those that torch.save never writes."""
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            self._name(argument.replace(" ", "."))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name == "TUPLE":
            items = self._pop_mark()
            self.stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            self.stack[-count:] = [tuple(self._top(count))]
        elif name in _STATEMENTS:
            _STATEMENTS[name](self)
        elif name not in ("PROTO", "STOP"):
            raise BrokenPickleError(f"operation {name} is not written by torch.save")

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise BrokenPickleError("an operation lacks its operands")
        return self.stack[-count:]

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _name(self, name: str) -> None:
        if name.startswith("__builtin__."):  # Python 2's name, which protocol 2 keeps
            name = "builtins." + name.removeprefix("__builtin__.")
        if name not in _CALLABLES and name not in _STORAGES and name not in _DTYPES and name not in _BUILTIN_TYPES:
            self.forbidden.append(name)
        self.stack.append(_Global(name))

    def _call(self) -> None:
        function, arguments = self._top(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise BrokenPickleError("it calls something that is no named class")
        if function.name in _BUILTIN_TYPES or function.name in _STORAGES or function.name in _DTYPES:
            self.forbidden.append(function.name)
        if function.name == "_codecs.encode" and not (len(arguments) == 2 and arguments[1] == "latin1"):
            self.forbidden.append(function.name)
        self.stack[-2:] = [_Made(function.name)]

    def _build(self) -> None:
        target, state = self._top(2)
        if not isinstance(target, _Made):
            raise BrokenPickleError("it sets the state of something that is no object")
        if target.name == "argparse.Namespace" and not (isinstance(state, _Made) and state.name == "dict"):
            raise BrokenPickleError("a Namespace has no plain state")
        self.stack.pop()

    def _append(self) -> None:
        self._top(2)
        self.stack.pop()

    def _extend(self) -> None:
        self._pop_mark()
        self._top(1)

    def _set_item(self) -> None:
        _, key, _ = self._top(3)
        self._check_key(key)
        del self.stack[-2:]

    def _set_items(self) -> None:
        for key in self._pop_mark()[::2]:
            self._check_key(key)
        self._top(1)

    def _check_key(self, key: Any) -> None:
        if not isinstance(key, _PRIMITIVE):  # hashing nested tuples can take for ever
            raise BrokenPickleError("a dictionary has keys other than text and numbers")

    def _persistent(self) -> None:
        (wanted,) = self._top(1)
        if not (isinstance(wanted, tuple) and len(wanted) in (5, 6) and isinstance(wanted[0], str)):
            raise BrokenPickleError("it refers to something outside that is no storage")
        word, kind, key, _, count = wanted[:5]
        known = isinstance(kind, _Global) and kind.name in _STORAGES
        if word != "storage" or not known or not isinstance(key, str) or type(count) is not int or count < 0:
            raise BrokenPickleError("it refers to something outside that is no storage")
        if len(wanted) == 6 and wanted[5] is not None:
            raise BrokenPickleError("it has storage views, which only torch before 0.4 wrote; save it with a newer one")
        storage = Storage(key, count * _STORAGES[kind.name])
        if self.storages.setdefault(key, storage) != storage:
            raise BrokenPickleError(f"storage {key[:20]} is claimed with two sizes")
        self.stack[-1] = _Made("storage")


_PUSHES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS: dict[str, Any] = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_LIST": _Made("list"),
    "EMPTY_DICT": _Made("dict"), "EMPTY_SET": _Made("set"),
}  # fmt: skip
_STATEMENTS: dict[str, Callable[[_Machine], None]] = {
    "REDUCE": _Machine._call, "NEWOBJ": _Machine._call, "BUILD": _Machine._build, "APPEND": _Machine._append,
    "APPENDS": _Machine._extend, "SETITEM": _Machine._set_item, "SETITEMS": _Machine._set_items,
    "BINPERSID": _Machine._persistent,
}  # fmt: skip


def scan_pickle(data: IO[bytes] | Any) -> tuple[Any, list[Storage]]:
    """Walk one pickle from the current position of ``data`` to its end.

    Returns (its value where that is a plain one, the storages it wants). Raises UnsafePickleError naming every class or
    function that is not on the list, BrokenPickleError for anything else that torch.save does not write. Nothing is
    imported, called or allocated beyond the pickle's own length.
    """
    machine = _Machine()
    start = data.tell()
    try:
        for operation, argument, position in pickletools.genops(data):
            if (position or 0) - start > MAX_PICKLE_BYTES:
                raise BrokenPickleError("its pickle is longer than any checkpoint needs")
            machine.step(operation.name, argument)
    except BrokenPickleError:
        if machine.forbidden:
            raise UnsafePickleError(_unique(machine.forbidden)) from None
        raise
    except Exception as error:  # pickletools and missing operands raise many kinds; all mean: no whole pickle
        if machine.forbidden:
            raise UnsafePickleError(_unique(machine.forbidden)) from None
        raise BrokenPickleError("its pickle is cut off or damaged") from error
    if machine.forbidden:
        raise UnsafePickleError(_unique(machine.forbidden))
    if len(machine.stack) != 1 or machine.marks:
        raise BrokenPickleError("its pickle does not hold one thing")
    return machine.stack[-1], list(machine.storages.values())


def _unique(names: list[str], limit: int = 3) -> list[str]:
    return [name[:80] for name in dict.fromkeys(names)][:limit]
