"""What all export formats share: a folder that is complete or absent, the comparison, and the facts kept with it."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.checkpoints.store import OWN_FACTS
from mim_refiner.errors import InputError
from mim_refiner.export.model_card import model_card
from mim_refiner.export.parity import CheckImages, Parity, check_images, compare
from mim_refiner.files import atomic_folder, read_json
from mim_refiner.models.backbone import Backbone

Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Format:
    """One export format."""

    name: str
    tolerance: float
    reader: str  # who loads the result, for messages
    compared: str  # what the comparison covers
    write: Callable[[Backbone, Path, dict[str, Any]], dict[str, Any]]  # (encoder, folder, facts) -> config.json
    pairs: Callable[[Backbone, Path, Tensor, dict[str, Any]], Pairs]  # ... images -> (expected, exported) tensors


def write_export(
    format: Format,
    backbone: Backbone,
    out_dir: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    images: CheckImages | None = None,
) -> dict[str, Any]:
    """Write the encoder's files, config.json and README.md, run the exported model, and compare it with the encoder.

    ``card``: what :func:`model_card` shows (base, data, recipe, before, after, ...); ``facts``: JSON-ready extras such
    as the recommended block, pooling and norm. Both are kept under "mim_refiner" in config.json, with the comparison.
    ``images``: what it is made on (default: images embedded in the package).
    The folder appears complete or not at all; an earlier export of ours there is replaced.
    Returns {"path", "format", "files", "parameters", "max_abs_difference", "tolerance", "checked"}. Raises InputError
    if the format cannot express the encoder, the exported model differs, or the folder is not ours or not writable.
    """
    out = Path(out_dir).absolute()
    backbone = _on_cpu(backbone)
    own = _own_facts(backbone, format, card or {}, facts or {})
    with new_folder(out) as folder:
        config = format.write(backbone, folder, own)
        _write_config(folder, config, own)
        images = images or check_images(backbone.info)
        parity = _check(format, backbone, folder, images, own)
        own["parity"] = parity.to_json()
        _write_config(folder, config, own)
        text = model_card(backbone.info, card or {}, own)
        (folder / "README.md").write_text(text, encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
    return {
        "path": str(out),
        "format": format.name,
        "files": names,
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "max_abs_difference": parity.max_abs_difference,
        "tolerance": format.tolerance,
        "checked": parity.sentence(),
    }


def _check(format: Format, backbone: Backbone, folder: Path, images: CheckImages, own: dict[str, Any]) -> Parity:
    with torch.random.fork_rng(devices=[]), torch.inference_mode():  # libraries draw weights before they load them
        pairs = format.pairs(backbone, folder, images.pixels, own)
        what = f"the model as {format.reader} loads it"
        return compare(pairs, format.tolerance, images, what=what, compared=format.compared)


def _on_cpu(backbone: Backbone) -> Backbone:
    """The encoder on the CPU in float32 and eval mode, with plain attention; the caller's keeps device and mode."""
    ours = copy.deepcopy(backbone).cpu().float().eval()
    ours.use_math_attention()
    return ours


def _own_facts(backbone: Backbone, format: Format, card: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    info = backbone.info
    return {
        "version": __version__,
        "format": format.name,
        "family": info.family,
        "licence": info.licence,
        "base": Path(info.source).name if info.source else "",  # a folder of ours concerns nobody else
        "architecture": info.architecture,
        "image_size": list(info.image_size),
        "mean": list(info.mean),
        "std": list(info.std),
        "norm_eps": info.norm_eps,
        "position_rule": info.position_rule,
        "encoder_pooling": info.pooling,
        **facts,
        "card": dict(card),
    }


def _write_config(folder: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    try:
        text = json.dumps({**config, OWN_FACTS: own}, indent=2)
    except TypeError as error:
        raise InputError(f"export card, facts and model arguments must be plain JSON values: {error}") from error
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; it becomes ``out`` when the block ends well, and vanishes when it does not.

    Raises InputError when ``out`` holds anything but an earlier export of ours, or cannot be written.
    """
    check_target(out)
    try:
        with atomic_folder(out) as folder:
            yield folder
            for path in folder.iterdir():
                path.chmod(0o644)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); free space or choose another --out") from error


def check_target(out: Path) -> None:
    """Raise InputError unless ``out`` is free: absent, empty, or an earlier export of ours."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the export")
    if out.is_dir() and any(out.iterdir()) and not is_own_export(out):
        others = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise InputError(f"{out}: holds other files ({others}); choose an empty or new folder")


def is_own_export(folder: Path) -> bool:
    """Whether ``folder`` holds an export of ours and nothing that an export does not write.

    Its config.json says so; in a run folder it may be damaged.
    """
    known = {"config.json", "README.md", "preprocessor_config.json"}
    weights = ("model.safetensors", "model.onnx", "model.onnx.data", "model.th")
    if any(path.name not in known and path.name not in weights for path in folder.iterdir()):
        return False
    return bool(source_facts(folder)) or (folder.name == "export" and (folder.parent / "recipe.yaml").exists())


def source_facts(source: str | Path) -> dict[str, Any]:
    """What an earlier export kept about itself, empty for any other source; run folders are asked for their export/."""
    folder = Path(str(source).removeprefix("local-dir:")).expanduser()
    for place in (folder / "export", folder):
        try:
            config = read_json(place / "config.json")
        except Exception:  # a damaged file tells nothing
            continue
        own = config.get(OWN_FACTS) if isinstance(config, dict) else None
        return own if isinstance(own, dict) else {}
    return {}
