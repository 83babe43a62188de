"""Find the weights that a model source names: a file, a folder, a timm name or a Hugging Face repository."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import timm
from huggingface_hub import snapshot_download

from mim_refiner.checkpoints.catalog import CATALOGUE
from mim_refiner.checkpoints.download import fetch
from mim_refiner.checkpoints.folders import (
    ADAPTER,
    CONFIG,
    PREPROCESSOR,
    WEIGHT_ENDINGS,
    WEIGHT_FILES,
    read_file,
    read_folder,
)
from mim_refiner.checkpoints.store import Contents, read_checkpoint
from mim_refiner.errors import CheckpointError, did_you_mean, nearest_path
from mim_refiner.files import errors_as

_HUB_FILES = [
    CONFIG, PREPROCESSOR, ADAPTER, *WEIGHT_FILES, "*.index.json", "model-*-of-*.safetensors",
    "pytorch_model-*-of-*.bin", "adapter_model.*",
]  # fmt: skip


def read_source(source: str | Path) -> Contents:
    """All tensors behind ``source``; see :func:`mim_refiner.checkpoints.load.load_backbone` for what it may be.

    Raises CheckpointError if nothing is found there, or it cannot be read safely or downloaded.
    """
    text = str(source).removeprefix("local-dir:")
    path = Path(text).expanduser()
    if path.is_dir():
        return read_folder(path, _read_base)
    if path.exists():
        return read_file(path, _read_base)
    match = re.fullmatch(r"hf[-_]hub:([^@]+)(?:@(.+))?", text)
    if match:
        return replace(read_folder(_download(match[1], match[2], text), _read_base), source=text)
    if text in CATALOGUE:
        entry = CATALOGUE[text]
        by_hub = entry.address.startswith("hf-hub:")
        return replace(read_source(entry.address) if by_hub else read_checkpoint(fetch(entry)), source=text)
    if timm.is_model(text.partition(".")[0]):
        return _read_timm_name(text)
    if "/" in text or "\\" in text or path.suffix in WEIGHT_ENDINGS:
        raise CheckpointError(f"{text}: no such file or folder{nearest_path(text) or '; check the path'}")
    close = did_you_mean(text, [*CATALOGUE, *timm.list_models("vit*")])
    raise CheckpointError(f"'{text}' is no file, model name or hf-hub:owner/name{close or '; check the name'}")


def _read_base(name: str) -> Contents:
    """The model that an adapter is for: a folder, or a repository of the hub."""
    return read_source(name if Path(name).expanduser().exists() or ":" in name else f"hf-hub:{name}")


def _read_timm_name(name: str) -> Contents:
    """Published weights of a timm model, from the Hugging Face repository that timm's registry names."""
    config = timm.get_pretrained_cfg(name) if "." in name and timm.is_model_pretrained(name) else None
    if config is None:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        choose = f"name one of its weights: {', '.join(tags[:4])}" if tags else "timm has no weights for it"
        raise CheckpointError(f"'{name}' names an architecture without weights; {choose}")
    if not config.hf_hub_id:
        raise CheckpointError(f"'{name}': timm knows no repository of it; download its file, pass the path")
    return replace(read_folder(_download(config.hf_hub_id, None, name), _read_base), source=name)


def _download(repository: str, revision: str | None, source: str) -> Path:
    remedy = "check name and network, or download the folder elsewhere and pass its path"
    # the hub's client raises its own, httpx's and OSError; all mean: not available
    with errors_as(CheckpointError, f"'{source}': cannot be downloaded", remedy):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
