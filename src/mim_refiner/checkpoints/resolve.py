"""Find the weights that a model source names: a file, a folder, a timm name or a Hugging Face repository."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import timm
from huggingface_hub import snapshot_download

from mim_refiner.checkpoints.catalog import CATALOGUE
from mim_refiner.checkpoints.download import fetch
from mim_refiner.checkpoints.store import Contents, one_line, read_checkpoint, read_config
from mim_refiner.errors import CheckpointError, did_you_mean, nearest_path

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
_WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".th")
_PREPROCESSOR = "preprocessor_config.json"  # of transformers: mean and std of the images
_HUB_FILES = ["config.json", _PREPROCESSOR, *_WEIGHT_FILES]


def read_source(source: str | Path) -> Contents:
    """All tensors behind ``source``; see :func:`mim_refiner.checkpoints.load.load_backbone` for what it may be.

    Raises CheckpointError if nothing is found there, or it cannot be read safely or downloaded.
    """
    text = str(source).removeprefix("local-dir:")
    path = Path(text).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return read_checkpoint(path)
    match = re.fullmatch(r"hf[-_]hub:([^@]+)(?:@(.+))?", text)
    if match:
        return replace(_read_folder(_download(match[1], match[2], text)), source=text)
    if text in CATALOGUE:
        return replace(_read_catalogue(text), source=text)
    if timm.is_model(text.partition(".")[0]):
        return _read_timm_name(text)
    if "/" in text or "\\" in text or path.suffix in _WEIGHT_ENDINGS:
        raise CheckpointError(f"{text}: no such file or folder{nearest_path(text) or '; check the path'}")
    close = did_you_mean(text, [*CATALOGUE, *timm.list_models("vit*")])
    raise CheckpointError(
        f"'{text}' is no file, folder, catalogue or timm model name or hf-hub:owner/name{close or '; check the name'}"
    )


def _read_catalogue(name: str) -> Contents:
    address = CATALOGUE[name].address
    return read_source(address) if address.startswith("hf-hub:") else read_checkpoint(fetch(CATALOGUE[name]))


def _read_folder(folder: Path) -> Contents:
    """A timm folder, or a run folder with one under export/."""
    if (folder / "export" / "config.json").exists():
        folder = folder / "export"
    elif (folder / "recipe.yaml").exists() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: this run has no export/ yet; run its command again to finish it")
    config = read_config(folder)
    if (folder / _PREPROCESSOR).exists():
        config["preprocessor"] = read_config(folder, _PREPROCESSOR)
    contents = read_checkpoint(_weight_file(folder), config=config)
    return replace(contents, source=str(folder))


def _weight_file(folder: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_ENDINGS)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{folder}: holds several weight files ({names}); name the chosen one model.safetensors")
    raise CheckpointError(f"{folder}: has a config.json but no weights; put model.safetensors beside it")


def _read_timm_name(name: str) -> Contents:
    """Published weights of a timm model, from the Hugging Face repository that timm's registry names."""
    config = timm.get_pretrained_cfg(name) if "." in name and timm.is_model_pretrained(name) else None
    if config is None:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        choose = f"name one of its weights: {', '.join(tags[:4])}" if tags else "timm has no weights for it"
        raise CheckpointError(f"'{name}' names an architecture without weights; {choose}")
    if not config.hf_hub_id:
        raise CheckpointError(
            f"'{name}': timm knows no Hugging Face repository of it; download its file, pass the path"
        )
    return replace(_read_folder(_download(config.hf_hub_id, None, name)), source=name)


def _download(repository: str, revision: str | None, source: str) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises its own, httpx's and OSError; all mean: not available
        raise CheckpointError(
            f"'{source}': cannot be downloaded ({type(error).__name__}: {one_line(error, 100)}); "
            "check name and network, or download the folder elsewhere and pass its path"
        ) from error
