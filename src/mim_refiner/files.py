"""Writing files whole or not at all, and the one boundary around reading what others wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import yaml

from mim_refiner.errors import DataError, MimRefinerError, RunFolderError, reason_of

CACHE_VARIABLE = "MIM_REFINER_CACHE"
TEXT_BYTES = 2**20  # of a settings file; YAML is read slowly
CACHE_OFF = ("off", "none", "no", "false", "0")  # instead of a folder


def cache_folder() -> Path:
    """Where downloads are kept: $MIM_REFINER_CACHE, else (also when that says off) the user's own cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE, "").strip()
    if chosen and not cache_is_off(chosen):
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "mim-refiner"
    except RuntimeError:  # no home: nothing can be kept, and what tries says so
        return Path(os.devnull) / "mim-refiner"


def read_regular(path: str | os.PathLike[str], *, most: int | None = None) -> bytes:
    """The content of a file; ValueError for a pipe or device, which would never end, and above ``most`` bytes."""
    nonblocking = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | nonblocking)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("is no regular file")
        if most is not None and facts.st_size > most:
            raise ValueError(f"{facts.st_size} bytes are more than {most}")
        return file.read()


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a dozen lines of them stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read; write the values out")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        # JSON, which YAML holds, escapes a character beyond 16 bits (an emoji) in two halves: they are put together
        return super().construct_scalar(node).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def load_yaml(text: str | bytes) -> Any:
    """Plain YAML values; raises almost anything for what is none, so use it within :func:`reading`."""
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The values in a YAML file of at most 1 MB; use it within :func:`reading`."""
    return load_yaml(read_regular(path, most=TEXT_BYTES))


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(value: Any) -> bytes:
    """Plain YAML that :func:`load_yaml` reads."""
    return yaml.dump(value, Dumper=_PlainDumper, sort_keys=False).encode()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file; use it within :func:`reading`."""
    return json.loads(read_regular(path))


def read_mapping(path: str | os.PathLike[str], read: Callable[[Any], Any] = read_json) -> dict[str, Any]:
    """What a file of ours says; nothing where it is not there or damaged."""
    with contextlib.suppress(Exception):
        value = read(path)
        return value if isinstance(value, dict) else {}
    return {}


@contextlib.contextmanager
def errors_as(kind: type[MimRefinerError], problem: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Any of ``errors`` (none named: any but our own) inside becomes ``kind``, in one line with its reason."""
    try:
        yield
    except errors or Exception as error:  # noqa: B030 - one class or a tuple of them
        if not errors and isinstance(error, MimRefinerError):
            raise
        raise kind(f"{problem} ({reason_of(error)}); {remedy}") from error


def reading(
    what: object, remedy: str, kind: type[MimRefinerError] = DataError
) -> contextlib.AbstractContextManager[None]:
    """The one boundary for foreign input and run folders: any error inside becomes one line, ``kind``, that names it.

    Readers of damaged or hostile files raise almost anything, MemoryError and RecursionError among it.
    """
    return errors_as(kind, f"{what}: cannot be read", remedy)


def cache_is_off(chosen: str | None = None) -> bool:
    """Whether ``chosen`` (by default $MIM_REFINER_CACHE) is no folder but a word for keeping nothing."""
    return (os.environ.get(CACHE_VARIABLE, "") if chosen is None else chosen).strip().lower() in CACHE_OFF


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write; it takes the name ``path`` when the block ends well, and vanishes when it does not.

    Folders are made, the content is synced before the rename. Raises RunFolderError when writing is not possible.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        short = "requested and" in str(error)  # numpy's words, without an errno
        room = "make room there, or " if short or error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = "the disk is full" if short else error.strerror or error
        raise RunFolderError(f"{path}: cannot write ({reason}); {room}choose a folder that can be written") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the name ``path``, in place of what stands there, when the block ends well.

    When it does not it vanishes. What it holds is synced first. OSErrors pass through.
    """
    work, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp") for kind in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        for file in (*work.iterdir(), work):
            sync(file)
        if path.exists():
            path.rename(old)  # first aside, so that no moment shows a mixture
        try:
            work.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``; a folder that it had only moved aside goes back."""
    for aside in folder.glob(".*.old.tmp"):
        whole = folder / aside.name.rsplit(".", 3)[0].removeprefix(".")
        if not whole.exists():
            aside.rename(whole)
    for leftover in folder.glob(".*.tmp"):
        remove(leftover)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a whole file at once; see :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write indented JSON; see :func:`write_bytes`."""
    return write_bytes(path, (json.dumps(json_value(value), indent=2, allow_nan=False) + "\n").encode())


def json_value(value: Any, nonfinite: Callable[[float], Any] = str) -> Any:
    """Dataclasses, paths, arrays and scalars of numpy or torch as plain values; of a number that JSON lacks what
    ``nonfinite`` says: by default its text, such as a k-NN temperature of ``"inf"``. TypeError for anything else.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(item, nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(item, nonfinite) for item in value]
    if hasattr(value, "tolist"):
        return json_value(value.tolist(), nonfinite)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as ``refinement.base_lr``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def name_of(given: object) -> str:
    """What messages and recipes call data or a model: its path, or the kind of object that a program gave."""
    if isinstance(given, str | os.PathLike):
        return os.fsdecode(os.fspath(given))
    return getattr(getattr(given, "info", None), "source", "") or f"{type(given).__name__} in memory"
