"""Find and read the weights that a model source names.

That is a file, a folder (timm, transformers whole or in shards, run folders, the hub's cache, adapters, distributed
checkpoints), a name of timm's or of the catalogue, or a Hugging Face repository.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from mim_refiner.checkpoints.adapters import plain_weights, with_adapter
from mim_refiner.checkpoints.catalog import CATALOGUE, fetch
from mim_refiner.checkpoints.held import Stub
from mim_refiner.checkpoints.pickles import read_pickle, read_torch
from mim_refiner.checkpoints.store import (
    OWN_FACTS,
    Contents,
    check_file,
    contents_of,
    leaves,
    read_checkpoint,
    read_config,
)
from mim_refiner.errors import CheckpointError, did_you_mean, nearest_path, one_line
from mim_refiner.files import errors_as

_CONFIG, _PREPROCESSOR, _ADAPTER = "config.json", "preprocessor_config.json", "adapter_config.json"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
_WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".th", ".ckpt")
_HUB_FILES = [
    _CONFIG, _PREPROCESSOR, _ADAPTER, *_WEIGHT_FILES, "*.index.json", "model-*-of-*.safetensors",
    "pytorch_model-*-of-*.bin", "adapter_model.*",
]  # fmt: skip
_MODEL_KEYS = {"architecture", "architectures", "model_type", "model_args", "pretrained_cfg", OWN_FACTS}
_INDEX = ".index.json"
_INDICES = [f"{name}{_INDEX}" for name in _WEIGHT_FILES]  # of a model in shards
_METADATA = ".metadata"  # of a distributed checkpoint
_DEEPSPEED = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # the second: of ZeRO 3
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER_TOOLS = {"flax_model.msgpack": ("Flax", "from_flax"), "tf_model.h5": ("TensorFlow", "from_tf")}
_NO_MODELS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "random_states_0.pkl"}  # Trainer's


def read_source(source: str | Path) -> Contents:
    """All tensors behind ``source`` (what it may be: load.load_backbone); CheckpointError where it cannot be read."""
    text = str(source).removeprefix("local-dir:")
    path = Path(text).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path)
    if match := re.fullmatch(r"hf[-_]hub:([^@]+)(?:@(.+))?", text):
        return _read_hub(match[1], match[2], text)
    if entry := CATALOGUE.get(text):
        by_hub = entry.address.startswith("hf-hub:")
        return replace(read_source(entry.address) if by_hub else read_checkpoint(fetch(entry)), source=text)
    if timm.is_model(text.partition(".")[0]):
        return _read_timm_name(text)
    if "/" in text or "\\" in text or path.suffix in _WEIGHT_ENDINGS:
        raise CheckpointError(f"{text}: no such file or folder{nearest_path(text) or '; check the path'}")
    close = did_you_mean(text, [*CATALOGUE, *timm.list_models("vit*")])
    raise CheckpointError(f"'{text}' is no file, model name or hf-hub:owner/name{close or '; check the name'}")


def _read_timm_name(name: str) -> Contents:
    """Published weights of a timm model, from the Hugging Face repository that timm's registry names."""
    config = timm.get_pretrained_cfg(name) if "." in name and timm.is_model_pretrained(name) else None
    if config is None:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        choose = f"name one of its weights: {', '.join(tags[:4])}" if tags else "timm has no weights for it"
        raise CheckpointError(f"'{name}' names an architecture without weights; {choose}")
    if not config.hf_hub_id:
        raise CheckpointError(f"'{name}': timm knows no repository of it; download its file, pass the path")
    return _read_hub(config.hf_hub_id, None, name)


def _read_hub(repository: str, revision: str | None, source: str) -> Contents:
    remedy = "check name and network, or download the folder elsewhere and pass its path"
    # the hub's client raises its own, httpx's and OSError; all mean: not available
    with errors_as(CheckpointError, f"'{source}': cannot be downloaded", remedy):
        folder = snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES)
    return replace(_read_folder(Path(folder)), source=source)


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of the files of these names that is there."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def _read_folder(folder: Path) -> Contents:
    """All tensors of the model in ``folder``, with its configs; CheckpointError for none, several or a part of one."""
    folder = _inner(folder)
    return _read_adapter(folder) if (folder / _ADAPTER).exists() else _read_model(folder)


def _read_model(folder: Path) -> Contents:
    if (folder / _METADATA).exists():
        contents = plain_weights(_read_distributed(folder))
    elif states := _first(folder, _DEEPSPEED):
        contents = plain_weights(read_checkpoint(states))
    else:
        contents = _with_configs(folder)
    return replace(contents, source=str(folder))


def _read_file(path: Path) -> Contents:
    """All tensors of a file; with the config of its folder where the file is that folder's model, or a part of it."""
    folder = path.parent
    if path.name == _METADATA or path.suffix == ".distcp":
        return _read_folder(folder)
    if path.name in (*_ADAPTER_FILES, *_WEIGHT_FILES) and (folder / _ADAPTER).is_file():
        return _read_adapter(folder)
    is_shard = path.name.partition("-")[0] in ("model", "pytorch_model") and "-of-" in path.name
    if index := path if path.name.endswith(_INDEX) else _first(folder, _INDICES) if is_shard else None:
        return replace(_with_configs(folder, index), source=str(path))
    if (folder / _CONFIG).is_file() and (path.name in _WEIGHT_FILES or _weights(folder) == [path]):
        return _with_configs(folder, path)
    return plain_weights(read_checkpoint(path))


def _with_configs(folder: Path, path: Path | None = None) -> Contents:
    """The tensors of a file of weights or an index of shards in ``folder``, with the configs there."""
    config = read_config(folder) if (folder / _CONFIG).exists() or (folder / _CONFIG).is_symlink() else {}
    if (folder / _PREPROCESSOR).exists():
        config["preprocessor"] = read_config(folder, _PREPROCESSOR)
    path = path or _first(folder, (*_WEIGHT_FILES, *_INDICES)) or _weight_file(folder)
    read = _read_shards(path) if path.name.endswith(_INDEX) else read_checkpoint(path, config=config)
    contents = plain_weights(read)
    if config and not _MODEL_KEYS & config.keys():  # of no library that we know: the training's own arguments
        return replace(contents, config=None, facts=leaves(config) | dict(contents.facts))
    return replace(contents, config=config or None)


def _inner(folder: Path) -> Path:
    """The folder that holds the model: a snapshot of the hub's cache, a run's export, DeepSpeed's latest."""
    if folder.name == "snapshots":
        folder = folder.parent
    models = [path for path in sorted(folder.glob("models--*")) if (path / "snapshots").is_dir()]
    if len(models) > 1:
        names = one_line(", ".join(path.name for path in models[:4]), 160)
        raise CheckpointError(f"{folder}: is a cache of {len(models)} models; give the folder of one ({names})")
    folder = models[0] if models else folder
    if (folder / "snapshots").is_dir():
        return _snapshot(folder)
    if (folder / "export" / _CONFIG).exists():
        return folder / "export"
    if (folder / "recipe.yaml").exists() and not (folder / _CONFIG).exists():
        raise CheckpointError(f"{folder}: this run has no export/ yet; run its command again, without --overwrite")
    if (folder / "latest").is_file():
        tag = (folder / "latest").read_bytes()[:256].decode("utf-8", "replace").strip()
        if tag and "/" not in tag and _first(folder / tag, _DEEPSPEED):
            return folder / tag
        raise CheckpointError(f"{folder}: 'latest' names {ascii(tag)[:80]}, which is not here; copy that folder here")
    return folder


def _snapshot(folder: Path) -> Path:
    """The snapshot that the branch main names, else the only one."""
    main = folder / "refs" / "main"
    named = main.read_text().strip() if main.is_file() else ""
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    chosen = [path for path in snapshots if path.name == named] or snapshots
    if not chosen:
        raise CheckpointError(f"{folder}: its download did not finish (no snapshots); download the model again")
    if len(chosen) > 1:
        newest = max(chosen, key=lambda path: path.stat().st_mtime)
        raise CheckpointError(f"{folder}: has {len(chosen)} snapshots; give the folder of one, the newest is {newest}")
    return chosen[0]


def _weights(folder: Path) -> list[Path]:
    others = {*_NO_MODELS, *(_ADAPTER_FILES if (folder / _ADAPTER).exists() else ())}
    files = (path for path in folder.iterdir() if path.suffix in _WEIGHT_ENDINGS and path.name not in others)
    return sorted(path for path in files if not path.name.startswith("rng_state"))


def _weight_file(folder: Path) -> Path:
    """The only file of weights; CheckpointError that says what the folder holds instead."""
    found = _weights(folder)
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:4])
    below = ", ".join(path.name for path in sorted(folder.iterdir()) if path.is_dir())
    other = next((what for name, what in _OTHER_TOOLS.items() if (folder / name).exists()), None)
    if any("-of-" in path.name for path in found):
        problem = "holds shards of a model without their index"
        remedy = "download its model.safetensors.index.json (pytorch_model.bin.index.json) into the folder"
    elif found:
        problem, remedy = f"holds several weight files ({names})", "give the path of the one you mean"
    elif other:
        problem, remedy = f"holds weights of {other[0]} only", f"load it with {other[1]}=True and save it again"
    elif (folder / _CONFIG).exists():
        problem, remedy = "has a config.json but no weights", "put model.safetensors beside it"
    elif below:
        problem, remedy = f"has no weights, only folders ({one_line(below)})", "give the one with the model"
    else:
        problem, remedy = "has no config.json and no weights", "give a timm folder, a finished run, or the weight file"
    raise CheckpointError(f"{folder}: {problem}; {remedy}")


def _read_shards(index: Path) -> Contents:
    """The tensors of all shards that ``index`` names; CheckpointError for a shard or tensor that is not there."""
    folder = index.parent
    files = read_config(folder, index.name).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()) or not files:
        raise CheckpointError(f"{index}: has no 'weight_map' of tensors to files; download it again")
    tensors: dict[str, Any] = {}
    for name in sorted(set(files.values())):
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names {ascii(name)[:80]}, which is not in its folder; download it again")
        if not path.exists():
            raise CheckpointError(f"{path}: this shard of the model is missing; download it into the folder")
        tensors |= read_checkpoint(path, config={}).sections.get("", {})
    missing = [name for name in files if name not in tensors]
    if missing:
        raise CheckpointError(f"{index}: its shards lack {missing[0][:80]} and {len(missing) - 1} more; download again")
    return Contents(source=str(index), sections={"": tensors})


def _read_adapter(folder: Path) -> Contents:
    """A PEFT folder, merged into its base model: the one beside it, else the one that it names."""
    config = read_config(folder, _ADAPTER)
    name = config.get("base_model_name_or_path")
    if (path := _first(folder, _ADAPTER_FILES)) is None:
        raise CheckpointError(f"{folder}: has an {_ADAPTER} but no {_ADAPTER_FILES[0]}; put it there")
    adapter = replace(read_checkpoint(path, config=config), source=str(folder))
    named = _first(folder, (*_WEIGHT_FILES, *_INDICES, _METADATA))
    if named or ((folder / _CONFIG).exists() and _weights(folder)):
        return with_adapter(_read_model(folder), adapter)
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder}: is a LoRA adapter that names no base model; merge it in PEFT and save that")
    try:  # a folder, or a repository of the hub
        base = read_source(name if Path(name).expanduser().exists() or ":" in name else f"hf-hub:{name}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: is an adapter (LoRA) of {name}, which was not found ({str(error)[:200]}); write the path of a "
            f"folder with that model as base_model_name_or_path into its {_ADAPTER}"
        ) from error
    return with_adapter(base, adapter)


# --- folders of torch.distributed.checkpoint (FSDP, FSDP2, Lightning, DINOv3): ``.metadata`` and its data files

Place = tuple[str, tuple[int, ...]]  # name of a tensor, where a chunk of it begins


def _read_distributed(folder: Path) -> Contents:
    """The tensors of the folder, put together from their chunks; the optimiser's are left out unread."""
    check_file(folder / _METADATA, folder)
    module = "torch.distributed.checkpoint"
    remedy = f"copy it again, or turn it into a file: python -m {module}.format_utils dcp_to_torch FOLDER FILE"
    with errors_as(CheckpointError, f"{folder}: is a damaged folder of {module}", remedy):
        fields = _fields(read_pickle((folder / _METADATA).read_bytes())[0])
        tensors, paths = _fields(fields.get("state_dict_metadata")), _fields(fields.get("planner_data"))
        stored = [(_fields(index), _fields(place)) for index, place in _fields(fields.get("storage_data")).items()]
        places = {(index["fqn"], tuple(index.get("offset") or ())): place for index, place in stored}
        found: dict[str, Any] = {}
        for name, about in tensors.items():
            chunks = _fields(about).get("chunks")
            if not isinstance(name, str) or not isinstance(chunks, list) or name.startswith("optim"):
                continue
            path = paths.get(name)
            section, last = (path[:-1], path[-1]) if isinstance(path, tuple) and path else ((), name)
            holder = found
            for part in section:
                holder = holder.setdefault(str(part), {})
            holder[str(last)] = _joined(folder, name, _fields(about).get("size"), chunks, places)
    return contents_of(found, folder)


def _fields(value: Any) -> Mapping[Any, Any]:
    return value.fields() if isinstance(value, Stub) else value if isinstance(value, Mapping) else {}


def _joined(folder: Path, name: str, size: Any, chunks: list[Any], places: Mapping[Place, Mapping[Any, Any]]) -> Tensor:
    """A whole tensor of its chunks, which must fill it: a size that is only claimed takes no memory."""
    parts = []
    for chunk in chunks:
        about = _fields(chunk)
        offset, shape = tuple(about["offsets"]), tuple(about["sizes"])
        part = _chunk(folder, places.get((name, offset)) or places[name, ()])
        if tuple(part.shape) != shape:
            raise ValueError(f"a chunk of {name} has another shape than the metadata says")
        parts.append((offset, part))
    if len(parts) == 1 and tuple(parts[0][1].shape) == tuple(size):
        return parts[0][1]
    if sum(part.numel() for _, part in parts) != math.prod(size):
        raise ValueError(f"the chunks of {name} do not fill it; a part of the folder is missing")
    whole, filled = torch.empty(tuple(size), dtype=parts[0][1].dtype), torch.zeros(tuple(size), dtype=torch.bool)
    for offset, part in parts:
        inside = tuple(slice(first, first + length) for first, length in zip(offset, part.shape, strict=True))
        if part.ndim != whole.ndim or whole[inside].shape != part.shape or bool(filled[inside].any()):
            raise ValueError(f"a chunk of {name} lies outside of it or on another one")
        whole[inside], filled[inside] = part, True
    return whole


def _chunk(folder: Path, place: Mapping[Any, Any]) -> Tensor:
    name, start, length = place["relative_path"], place["offset"], place["length"]
    if place.get("transform_descriptors"):
        raise ValueError("its data are compressed")
    path = folder / name
    check_file(path, folder)
    if not 0 <= start <= start + length <= path.stat().st_size:
        raise ValueError(f"{name} is cut off")
    with path.open("rb") as file:
        file.seek(start)
        content = bytearray(file.read(length))
    part = read_torch(io.BytesIO(content), memoryview(content), str(path))
    if not isinstance(part, Tensor):
        raise ValueError(f"{name} holds something else than a tensor")
    return part
