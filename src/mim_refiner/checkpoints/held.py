"""What stands for the things in a pickle: tensors on the file's own memory, and inert records of every other object."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_KEY_PARTS = 64

DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)
}

# Packages whose classes keep settings, times and histories; their objects become stubs. Only classes (CamelCase): the
# names of functions stay forbidden.
_DATA_PACKAGES = {
    "accelerate", "addict", "argparse", "attr", "attrdict", "box", "collections", "dataclasses", "datetime", "decimal",
    "deepspeed", "detectron2", "easydict", "enum", "fairseq", "fractions", "fvcore", "hydra", "ipaddress",
    "jsonargparse", "lightning",
    "lightning_fabric", "lightning_utilities", "ml_collections", "mmcls", "mmcv", "mmdet", "mmengine", "mmpretrain",
    "mmseg", "mmselfsup", "munch", "numpy", "omegaconf", "pathlib", "peft", "pytorch_lightning", "transformers",
    "typing", "uuid", "wandb", "yacs",
}  # fmt: skip
_DATA_MODULES = (
    "torch.torch_version.", "torch.distributed.", "torch.optim.", "torch.cuda.amp.", "torch.amp.", "torch.utils.data.",
    "torchvision.transforms.",
)  # fmt: skip
_LAYERS = ("torch.nn.", "timm.")  # packages whose classes are harmless as long as nothing is made of them
_DATA_NAMES = {
    "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone", "numpy.ndarray",
    "operator.getitem", "torch.device", "torch.Generator", "torch.Tensor", "torch.serialization._get_layout",
    "_io.BytesIO", "zoneinfo.ZoneInfo", "zoneinfo.ZoneInfo._unpickle", "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__randomstate_ctor", "types.SimpleNamespace",
    "types.MappingProxyType", "numpy.ma.core._mareconstruct", "numpy.rec.recarray", "builtins.range",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence", "builtins.Ellipsis", "builtins.NotImplemented",
    "builtins.type", "builtins.complex", "functools.partial", "re._compile",
    *(f"numpy.{name}" for name in dir(np) if isinstance(getattr(np, name), type)),
    *(f"builtins.{n}" for n in ("bool", "bytes", "dict", "float", "int", "list", "object", "slice", "str", "tuple")),
}  # fmt: skip
PART = "part of a DTensor"  # (shape of the part, of the whole); a name without a dot, which no pickle can give
NO_DENSE = {f"torch._utils._rebuild_{kind}" for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage")}
_NUMBERS = re.compile(r"[<>=|]?([biufc])\d{1,2}|\?")
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip


class BrokenPickleError(Exception):
    """The bytes are no complete pickle, or claim what they do not hold."""


@dataclass(eq=False)
class Named:
    """A class or function by its full name; a call of it in a pickle goes to ``called``."""

    name: str
    called: Callable[[Named, tuple[Any, ...]], Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.called is None:
            raise BrokenPickleError("it calls something that is no named class")
        return self.called(self, arguments)


@dataclass(eq=False)
class Stub:
    """An object that was not built: its class, what it was to be made of, what it contains, and its state."""

    name: str
    arguments: tuple[Any, ...] = ()
    items: dict[Any, Any] = field(default_factory=dict)
    members: list[Any] = field(default_factory=list)
    state: Any = None

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, member: Any) -> None:
        self.members.append(member)

    def build(self, state: Any) -> None:
        self.state = state

    def fields(self) -> dict[Any, Any]:
        """Items, members and state as one mapping; a wrapper of a single value (an enum, a node of a config) has {}."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        found = dict(enumerate(self.members)) | self.items
        for state in states:
            if isinstance(state, Mapping):
                found |= {key: item for key, item in state.items() if key != "_parent"}  # omegaconf's way back up
        return found


class _Dtype(Stub):
    """NumPy's dtype of plain numbers; ``dtype`` None = of anything else."""

    @property
    def dtype(self) -> np.dtype[Any] | None:
        text = self.arguments[0] if self.arguments else ""
        if not isinstance(text, str) or _NUMBERS.fullmatch(text) is None:
            return None
        swapped = isinstance(self.state, tuple) and self.state[1:2] == (">",)
        try:
            return np.dtype(text).newbyteorder(">" if swapped else "=")
        except TypeError:
            return None


class Array(Stub):
    """NumPy's array, whose numbers come with its state; ``tensor`` None = of another kind than numbers."""

    tensor: Tensor | None = None

    def build(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, kind, fortran, data = state
            found = _array(data, kind, shape, "F" if fortran else "C")
            self.tensor = found if isinstance(found, Tensor) else None


def _array(data: Any, kind: Any, shape: Any, order: Any) -> Tensor | Stub:
    dtype = kind.dtype if isinstance(kind, _Dtype) else None
    data = data.encode("latin1") if isinstance(data, str) else data
    if dtype is None or not isinstance(data, bytes) or not is_size(shape):
        return Stub("numpy.ndarray")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise BrokenPickleError("an array has another size than its shape says")
    values = np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    try:
        return torch.from_numpy(np.array(values, dtype.newbyteorder("="), order="C"))
    except TypeError:  # a kind of number that torch has not
        return Stub("numpy.ndarray")


def _scalar(kind: Any, data: Any = b"") -> Any:
    """A NumPy scalar as a Python number; a stub for text, times and objects."""
    value = _array(data, kind, (), "C")
    return value.item() if isinstance(value, Tensor) else value


def numbers(content: memoryview, dtype: torch.dtype) -> Tensor:
    """The numbers of a storage [n], on the file's own memory."""
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype) if len(content) else torch.empty(0, dtype=dtype)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A window on a storage [n]; BrokenPickleError where it reaches beyond."""
    if not isinstance(storage, Tensor) or not is_size((offset,)) or not is_size(size) or not is_size(stride):
        raise BrokenPickleError("a tensor has no storage or no shape")
    if len(size) != len(stride):
        raise BrokenPickleError("a tensor has other strides than dimensions")
    dtype = next((DTYPES[n.name] for n in rest if isinstance(n, Named) and n.name in DTYPES), storage.dtype)
    if 0 in size:
        return torch.empty(tuple(size), dtype=dtype)
    storage = storage.view(torch.uint8).view(dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(storage):
        raise BrokenPickleError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _rebuild_kind(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or of a subclass such as DTensor, whose own part of the numbers is in its state."""
    part = Stub("torch.Tensor", state=state).fields().get("_local_tensor")
    if isinstance(part, Tensor) and isinstance(arguments, tuple) and len(arguments) > 2:
        shape, whole = tuple(part.shape), arguments[2]
        return Stub(PART, (shape, tuple(whole))) if is_size(whole) and tuple(whole) != shape else part
    if isinstance(function, Named) and function.name in CALLS and isinstance(arguments, tuple):
        return CALLS[function.name](*arguments)
    return Stub("torch.Tensor")


def _pairs(items: Any = (), *_: Any) -> dict[Any, Any]:
    """An OrderedDict or Counter: {} or what a mapping or a list of pairs holds."""
    pairs: Any = list(items.items()) if isinstance(items, dict) else items
    known = isinstance(pairs, list | tuple)
    if not known or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise BrokenPickleError("an ordered dict is made of no pairs")
    for key, _ in pairs:
        check_key(key)
    return dict(pairs)


def _members(items: Any = (), *_: Any) -> list[Any]:
    """A set or deque as the list of its members."""
    if not isinstance(items, list | tuple):
        raise BrokenPickleError("a set is made of no list")
    return list(items)


def _bytes(text: Any = b"", encoding: Any = "latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise BrokenPickleError("bytes are made of something else than text")
    return text.encode("latin1")


_CORES = ("core", "_core")  # of NumPy 1 and 2
_AS_GIVEN = (  # calls that stand for their first argument
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer", "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
)  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs, "collections.Counter": _pairs, "collections.defaultdict": lambda *_: {},
    "collections.deque": _members, "builtins.set": _members,
    "builtins.frozenset": lambda items=(): tuple(_members(items)), "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes, "torch.Size": lambda size=(): tuple(_members(size)),
    "numpy.dtype": lambda *arguments: _Dtype("numpy.dtype", arguments),
    "torch._utils._rebuild_tensor": _rebuild, "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild, "torch._tensor._rebuild_from_type_v2": _rebuild_kind,
    "torch._utils._rebuild_wrapper_subclass": lambda *_: Stub("torch.Tensor"),
    **dict.fromkeys(_AS_GIVEN, lambda value, *_: value),
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in _CORES},
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array("numpy.ndarray") for core in _CORES},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in _CORES},
    **{name: lambda *_, name=name: Stub(name) for name in NO_DENSE},
    "copyreg._reconstructor": lambda kind, *_: Stub(kind.name), "copyreg.__newobj__": lambda kind, *_: Stub(kind.name),
}  # fmt: skip


def is_harmless(name: str) -> bool:
    if name in CALLS or name in _DATA_NAMES or name in DTYPES or storage_type(Named(name)) is not None:
        return True
    package = name.partition(".")[0]
    return _is_class(name) and (package in _DATA_PACKAGES or name.startswith((*_DATA_MODULES, *_LAYERS)))


def makes_code(function: Named, arguments: tuple[Any, ...]) -> str:
    """The class by whose objects a model computes, where a call makes one or a new class; "" for any other call.

    The same classes are harmless as values (norm_layer=torch.nn.LayerNorm among the options of a training).
    """
    made = arguments[0] if function.name.startswith("copyreg.") and arguments else function
    if not isinstance(made, Named) or (made.name == "builtins.type" and len(arguments) == 1):
        return ""
    layer = _is_class(made.name) and made.name.startswith(_LAYERS) and made.name not in CALLS
    return made.name if layer or made.name == "builtins.type" else ""


def _is_class(name: str) -> bool:
    return "." in name and name.rpartition(".")[2].lstrip("_")[:1].isupper()


def storage_type(kind: Any) -> torch.dtype | None:
    name = kind.name if isinstance(kind, Named) else ""
    if name == "torch.storage.UntypedStorage":
        return torch.uint8
    match = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)Storage", name)
    return _STORAGES.get(match[1]) if match else None


def is_size(size: Any) -> bool:
    return isinstance(size, list | tuple) and all(type(n) is int and 0 <= n < 2**62 for n in size)


def check_key(key: Any, parts: int = 1) -> int:
    """BrokenPickleError for a key whose hash could take for ever: shared nested tuples, enormous numbers."""
    if isinstance(key, tuple):
        for item in key:
            parts = check_key(item, parts + 1)
    plain = isinstance(key, str | bytes | float | complex | tuple | Stub | Named | Tensor | type(None))
    if parts > _MAX_KEY_PARTS or not (plain or (isinstance(key, int) and key.bit_length() < 256)):
        raise BrokenPickleError("a dictionary has keys other than text, numbers and short tuples of them")
    return parts
