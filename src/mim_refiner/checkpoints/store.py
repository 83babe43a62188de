"""Read checkpoint files safely: safetensors, or torch files without running any code they may carry."""

from __future__ import annotations

import json
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.checkpoints.held import NO_DENSE, PART, Array, Stub
from mim_refiner.checkpoints.pickles import PICKLE, ZIP, read_torch_file
from mim_refiner.errors import CheckpointError, one_line
from mim_refiner.files import errors_as, read_regular, reading

# Parts of names that DDP, torch.compile, FSDP and activation checkpointing put in.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"Rar!": "rar"}
OWN_FACTS = "mim_refiner"  # key in config.json under which our exports keep what timm has no field for
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_MAX_CONFIG_BYTES = 16 * 2**20
_LFS = b"version https://git-lfs"
_MAX_CONTAINERS = 200_000
_MAX_FACTS = 100_000
_ELSEWHERE = {  # words in the paths of options about other parts than the encoder
    "decoder", "decode", "predictor", "head", "heads", "neck", "pooler", "probe", "projector", "classifier", "teacher",
    "target", "text", "language", "tokenizer", "discriminator", "label", "labels",
}  # fmt: skip
_MAX_DEPTH = 32
_SHARED_SLACK = 64 * 2**20  # tensors may share memory in a file, but not so that it grows without bound


@dataclass(frozen=True)
class Contents:
    """All tensors of a checkpoint, grouped by the mapping that holds them.

    ``sections``: path of a mapping inside the file ("" for the top level, "model", "optimizer.state.0") to its
    {name as in the file: tensor}. ``config``: the config.json beside the weights, if any. ``facts``: the plain values
    in the file by path ("args.input_size", "cfg.model.num_heads"); lists are tuples.
    """

    source: str
    sections: dict[str, dict[str, Tensor]]
    config: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def fact(self, *names: str) -> Any:
        """What the file's own arguments, else the config beside it, say under the first of ``names`` that they have.

        A name is the end of a path. None where nothing is said, or several things that differ; what stands below an
        entry of a decoder, predictor or teacher (decoder_cfg, mask_decoder) is about that.
        """
        for facts in (self.facts, leaves(self.config or {})):
            for name in names:
                found = {
                    value
                    for path, value in facts.items()
                    if f".{path.lower()}".endswith(f".{name}") and not is_elsewhere(path)
                }
                if len(found) == 1:
                    return found.pop()
        return None


def words(name: str) -> set[str]:
    """The words of a name in any spelling: model_ema, modelEMA, EMAModel, ema2."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def is_elsewhere(path: str) -> bool:
    """Whether the option at ``path`` is about another part than the encoder, by the entries that it stands below."""
    above = re.sub(r"(?i)multi_?head", "", path.rpartition(".")[0])  # multi_head_attention is the encoder's
    return bool(_ELSEWHERE & words(above))


def read_checkpoint(path: Path, *, config: Mapping[str, Any] | None = None) -> Contents:
    """Read every tensor of the file at ``path`` (kind told from its first bytes, not from its name).

    ``config`` says that the file is part of a folder; a link that leads out of it is then refused. Raises
    CheckpointError for a file that is missing, no regular file, empty, truncated, no checkpoint, claims more than it
    holds, holds no tensor, or holds pickled objects other than plain data; such objects are never built.
    """
    check_file(path, None if config is None else path.parent)
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise CheckpointError(f"{path}: the file is empty; copy or download it again")
    # The length of a safetensors header may begin with a pickle's first byte, so the brace after it is looked at first.
    is_torch = start.startswith((ZIP, PICKLE)) and start[8:9] != b"{"
    return contents_of(read_torch_file(path) if is_torch else _read_safetensors(path, start), path, config)


def contents_of(payload: Any, path: Path, config: Mapping[str, Any] | None = None) -> Contents:
    """The tensors and plain values in what a reader found at ``path``."""
    sections: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Any] = {}
    for where, held in _mappings(payload, str(path)):
        tensors = {str(key): found for key, item in held.items() if (found := _tensor(item, path)) is not None}
        if tensors:
            sections[where] = tensors
        if not where.startswith("optim") and len(facts) < _MAX_FACTS:
            facts |= _plain_values(where, held)
    if not sections:
        raise CheckpointError(f"{path}: holds no tensors; give a file with a model's weights")
    zero = isinstance(payload, Mapping) and "param_shapes" in payload
    if zero and not any(tensor.numel() for tensor in sections.get("module", {}).values()):
        raise CheckpointError(
            f"{path}: is of DeepSpeed ZeRO 3, whose weights lie in parts in the other files; in the folder that holds "
            "the file 'latest' run 'python zero_to_fp32.py . whole', and give what it writes"
        )
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.exists())  # a link to nothing is no file
    total = sum(tensor.nbytes for tensors in sections.values() for tensor in tensors.values())
    if total > 4 * size + _SHARED_SLACK:
        raise CheckpointError(f"{path}: its tensors unfold from {size} to {total} bytes; save them with .contiguous()")
    return Contents(source=str(path), sections=sections, config=config, facts=facts)


def check_file(path: Path, folder: Path | None = None) -> None:
    """CheckpointError unless ``path`` (links followed) is a regular file: a pipe would block, a device never end.

    And where a link leads out of ``folder``. The hub's cache is the exception: what lies in a snapshot, at any depth,
    links to the blobs beside the snapshots.
    """
    with reading(one_line(path, 400), "check path and permissions", CheckpointError):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link to nothing; copy the file into the folder")
        mode, target = path.stat().st_mode, path.resolve(strict=True)
        root = target.parent if folder is None else folder.resolve(strict=True)
    blobs = [place.parent.parent / "blobs" for place in (root, *root.parents) if place.parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise CheckpointError(
            f"{path}: is a link that leads out of its folder (to {target}), so it was not read; copy the file into the "
            "folder, or give its own path"
        )
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: is a folder, not a file; give the weight file, or a folder with a config.json")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is a pipe, socket or device, not a file; copy its content to a file first")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config.json of ``folder`` as a dict; CheckpointError if missing or no JSON object."""
    path = folder / name
    check_file(path, folder)
    with errors_as(CheckpointError, f"{path}: is no readable JSON", "download it again"):
        content = read_regular(path, most=_MAX_CONFIG_BYTES)
        if content[:64].lstrip().startswith((_LFS, b"<")):
            raise CheckpointError(f"{path}: {_what_it_is(path)}")
        config = json.loads(content)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object with an 'architecture'; write or download it again")
    return config


def strip_wrappers(name: str) -> str:
    """``name`` without the parts that DDP, torch.compile, FSDP and activation checkpointing put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def some(names: Iterable[str]) -> str:
    """The first four names and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:4]) + (f" (+{len(listed) - 4} more)" if len(listed) > 4 else "")


def _read_safetensors(path: Path, start: bytes) -> Any:
    packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
    if packed:
        raise CheckpointError(f"{path}: is packed with {packed}; unpack it first")
    if not (len(start) == 9 and start[8:9] == b"{"):
        raise CheckpointError(f"{path}: {_what_it_is(path)}")
    problem = f"{path}: is a damaged or truncated safetensors file"
    with errors_as(CheckpointError, problem, "copy or download it again"), path.open("rb") as file:
        file.seek(8)
        header = file.read(min(int.from_bytes(start[:8], "little"), path.stat().st_size, _MAX_HEADER_BYTES))
        json.loads(header, object_pairs_hook=_unique_keys)  # the library takes the last of two tensors of one name
        return load_file(path)


def _what_it_is(path: Path) -> str:
    """What a file that is no checkpoint is, and what to do about it."""
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    if start.startswith(_LFS):
        return "is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder, or download the file itself"
    if start.removeprefix(b"\xef\xbb\xbf")[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<!--")):
        return "is a web page, not the weights; download the file again by the link that gives the file itself"
    if start.startswith((b"\x89HDF", b"GGUF")):
        kind = "an HDF5 file (Keras)" if start.startswith(b"\x89HDF") else "a GGUF file (quantised)"
        return f"is {kind}, which is not read; save the weights with torch.save or safetensors"
    if not start.strip(b"\0"):
        return "begins with nothing but zeros: its download did not finish; download it again"
    if start.startswith(b"{"):
        return f"is text ({one_line(start[:60].decode('utf-8', 'replace'))}), not the weights; download the file again"
    if tarfile.is_tarfile(path):
        return "is a tar archive; unpack it, and give the checkpoint inside (save that of torch before 0.1.10 again)"
    return "is not a checkpoint; give a .safetensors file, or a .pth/.pt/.bin file written by torch.save"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return dict(pairs)


def _tensor(item: Any, path: Path) -> Tensor | None:
    """``item`` as a tensor; None for anything else."""
    if not isinstance(item, Stub):
        return item if isinstance(item, Tensor) else None
    if item.name == PART:
        part, whole = map(list, item.arguments)
        raise CheckpointError(
            f"{path}: holds one process's part {part} of a tensor {whole} (DTensor, FSDP2); gather the state dict "
            "(full_state_dict=True) and save it, or give a folder of distributed checkpoint"
        )
    if item.name.endswith(".ShardedTensor"):
        raise CheckpointError(
            f"{path}: holds one process's part of sharded tensors (FSDP); save the full state dict "
            "(FULL_STATE_DICT), or give a folder of distributed checkpoint"
        )
    if item.name in NO_DENSE:
        raise CheckpointError(f"{path}: holds sparse or quantised tensors; save it with plain dense ones")
    return item.tensor if isinstance(item, Array) else None


def _mappings(payload: Any, source: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All mappings, lists and objects inside ``payload`` as mappings, with their paths; outer ones first."""
    outermost = {"tensor": payload} if isinstance(payload, Tensor | Array) else payload
    waiting: list[tuple[Any, str, int]] = [(outermost, "", 0)]
    for _ in range(_MAX_CONTAINERS):
        if not waiting:
            return
        value, path, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            break
        value = _unfolded(value)
        if not isinstance(value, Mapping):
            continue
        yield path, value
        inner = [
            (item, f"{path}.{key}" if path else str(key), depth + 1)
            for key, item in value.items()
            if isinstance(item, Mapping | list | tuple | Stub) or _is_json(item)
        ]
        waiting.extend(reversed(inner))
    # A list that holds itself, or two lists that hold each other twice, would never end.
    raise CheckpointError(f"{source}: is nested without end; save a plain state dict")


def _unfolded(value: Any) -> Any:
    """A list, object or JSON text as a mapping; omegaconf's containers as what they hold."""
    if _is_json(value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Stub):
        fields = value.fields()
        value = fields["_content"] if isinstance(fields.get("_content"), Mapping | list) else fields
    return dict(enumerate(value)) if isinstance(value, list | tuple) else value


def _is_json(item: Any) -> bool:
    """Whether ``item`` may be arguments as JSON text."""
    return isinstance(item, str) and len(item) <= _MAX_CONFIG_BYTES and item.lstrip()[:1] == "{"


def _plain_values(where: str, held: Mapping[Any, Any]) -> dict[str, Any]:
    named = {key: item for key, item in held.items() if isinstance(key, str)}  # members of lists have no names
    return {f"{where}.{key}".lstrip("."): value for key, item in named.items() if (value := _plain(item)) is not None}


def _plain(item: Any, depth: int = 0) -> Any:
    """A number, text, or short tuple of them (also as an array or tensor); None for anything else."""
    item = item.tensor if isinstance(item, Array) else item
    if isinstance(item, Tensor):
        values = item.squeeze()
        if values.ndim > 1 or not 0 < values.numel() <= 16:
            return None
        return tuple(values.tolist()) if values.ndim else values.item()
    if isinstance(item, Stub):
        fields = item.fields()
        if not fields and len(item.arguments) == 1:
            return _plain(item.arguments[0], depth + 1) if depth < 3 else None  # an enum
        item = fields.get("_val", fields.get("_content"))
    if isinstance(item, list | tuple) and 0 < len(item) <= 16 and depth < 3:
        parts = tuple(_plain(part, depth + 1) for part in item)
        return None if None in parts else parts
    return item if isinstance(item, bool | int | float | str) else None


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for where, held in _mappings(config, "config") for name, value in _plain_values(where, held).items()
    }
