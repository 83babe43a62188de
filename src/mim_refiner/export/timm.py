"""Write an encoder as a folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.errors import InputError
from mim_refiner.export.model_card import model_card
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.vit import BASE_ARCHITECTURE, registered_name, standard_name, vit_arguments

# Largest difference to the reloaded model, relative to the largest output, that still counts as the same function.
TOLERANCE = 1e-6
_WRITTEN = ("config.json", "model.safetensors", "README.md")


def export_timm(
    backbone: Backbone,
    out_dir: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    check_images: Tensor | None = None,
) -> dict[str, Any]:
    """Write config.json, model.safetensors and README.md, reload them through timm and compare.

    ``card``: what :func:`model_card` shows (base, data, recipe, before, after, ...). ``facts``: JSON-ready extras kept
    under "mim_refiner" in config.json, such as the recommended block, pooling and norm. ``check_images`` [B, C, H, W]
    (normalised; random if None) go through both models.
    The folder appears complete or not at all; an earlier export of ours there is replaced.
    Returns {"path", "max_abs_difference", "tolerance", "parameters", "files"}. Raises InputError if the folder holds
    something else or cannot be written, or if timm's model gives other outputs.
    """
    out = Path(out_dir).absolute()
    _check_target(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        _write(backbone, work, card or {}, facts or {})
        difference, tolerance = _compare(backbone, work, check_images)
        _swap(work, out)
    except OSError as error:
        raise InputError(f"{out}: writing failed ({error.strerror}); free space or choose another --out") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "path": str(out),
        "max_abs_difference": difference,
        "tolerance": tolerance,
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "files": list(_WRITTEN),
    }


def timm_config(backbone: Backbone, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of the folder, in the layout that timm's ``local-dir:`` and ``hf-hub:`` sources read."""
    model, info = backbone.model, backbone.info
    if type(model) is VisionTransformer:
        arguments = {name: value for name, value in vit_arguments(model).items() if value is not None}
    else:
        recorded = getattr(model, "_model_args", {})  # what timm's factory was called with
        arguments = {name: value for name, value in recorded.items() if name != "num_classes"}
    architecture = registered_name(model)
    if type(model) is VisionTransformer and architecture in (None, BASE_ARCHITECTURE):
        # The name is free here, since every argument is written; take the one that tells the size.
        architecture = standard_name(info.embed_dim, info.depth, info.num_heads, info.patch_size) or BASE_ARCHITECTURE
    if architecture is None:
        raise InputError(
            f"{type(model).__name__} was not made by timm.create_model, so timm cannot rebuild it; "
            "load it by load_backbone"
        )
    own = {
        "version": __version__,
        "family": info.family,
        "licence": info.licence,
        "base": Path(info.source).name if info.source else "",  # a folder of ours concerns nobody else
        "architecture": info.architecture,
    }
    return {
        "architecture": architecture,
        "num_classes": int(getattr(model, "num_classes", 0)),
        "num_features": info.embed_dim,
        "global_pool": getattr(model, "global_pool", ""),
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "mim_refiner",
            "input_size": [info.in_chans, *info.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": int(getattr(model, "num_classes", 0)),
            "pool_size": None,
            "first_conv": _default(model, "first_conv", "patch_embed.proj"),
            "classifier": _default(model, "classifier", "head"),
            "license": info.licence,
        },
        "mim_refiner": own | dict(facts or {}),
    }


def _write(backbone: Backbone, folder: Path, card: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    config = timm_config(backbone, facts)
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise InputError(f"export facts and model arguments must be plain JSON values: {error}") from error
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(model_card(backbone.info, card, config["mim_refiner"]), encoding="utf-8")
    folder.chmod(0o755)  # mkdtemp makes it private


def _compare(backbone: Backbone, folder: Path, images: Tensor | None) -> tuple[float, float]:
    """Return (largest difference of the output tokens, what is allowed); InputError above it."""
    info = backbone.info
    if images is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, info.in_chans, *info.image_size, generator=generator)
    with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
        reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = copy.deepcopy(backbone.model).cpu().float().eval()
    for module in (*ours.modules(), *reloaded.modules()):
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the same kernel on both sides
    with torch.inference_mode():
        expected, got = (model.forward_features(images.cpu().float()) for model in (ours, reloaded))
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
    difference = float((expected - got).abs().max()) if expected.shape == got.shape else float("inf")
    if not difference <= tolerance:
        raise InputError(
            f"export: timm's reloaded model differs by {difference:.2g} (allowed {tolerance:.2g}), nothing written; "
            f"the architecture '{info.architecture}' has parts that its timm name does not describe: "
            "keep its run folder instead"
        )
    return difference, tolerance


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the export")
    others = [path.name for path in out.iterdir() if path.name not in _WRITTEN] if out.is_dir() else []
    if others:
        raise InputError(f"{out}: holds other files ({', '.join(sorted(others)[:3])}); choose an empty or new folder")


def _swap(work: Path, out: Path) -> None:
    """Put the finished folder in place; an earlier export is moved aside first, so that no moment shows a mixture."""
    if not out.exists():
        os.replace(work, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    os.replace(out, old)  # onto an empty folder: allowed and atomic
    try:
        os.replace(work, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _default(model: Any, key: str, otherwise: str) -> Any:
    config = getattr(model, "pretrained_cfg", None)
    return config.get(key, otherwise) if isinstance(config, dict) else otherwise
