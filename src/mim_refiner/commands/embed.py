"""``embed``: features of a data set to one file, with a manifest that says what they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mim_refiner._version import __version__
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.checkpoints.options import parse_size
from mim_refiner.commands.inputs import announce, tell_unreadable
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import InputError, RunFolderError
from mim_refiner.evaluation.embedding import (
    ENDINGS,
    FeatureSpec,
    class_list,
    compute_features,
    rows_file,
    write_features,
)
from mim_refiner.files import json_value, name_of, read_mapping, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter, listener
from mim_refiner.types import ImageSize, side_or_pair


def embed(
    *,
    model: Any,
    data: Any,
    out: str | None = None,
    block: int = -1,
    pooling: str | None = None,
    norm: bool = False,
    image_size: ImageSize | str | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    dtype: str = "float32",
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write the features of every image of ``data`` to ``out`` (.parquet, .npy or .safetensors), one row an image.

    Without ``out`` nothing is written: the result holds "features" [n, D], and of each row the image's number
    ("indices") and class ("labels", None without). ``data`` is a path or what a program holds (an array, a list of
    pictures, a torch or Hugging Face data set), ``model`` a source of load_backbone.

    ``block``: negative numbers count from the last. ``pooling``: "cls", "mean" of the patch tokens, or "patches" (all
    of them, [N, D] a row); None: what the encoder's authors pool by, mostly cls. ``norm`` applies the encoder's
    final norm. ``image_size``: a side in pixels, (height, width) or "192x256"; default the encoder's own.
    ``precision`` of the forward pass: fp32, bf16, auto. ``dtype`` of the file: float32, float16.

    ``<out>.manifest.json`` says what the rows are. What is finished stays in ``<out>.parts/`` until the file is
    complete, so the same call after an interruption goes on and gives the same bytes; once complete it does nothing.
    Unreadable images have no row and are listed in the manifest. Returns what was written and images/s.
    Raises MimRefinerError in one line on bad input, or for an ``out`` of other settings (``overwrite`` replaces it).
    """
    reporter = listener(reporter)
    path = None if out is None else Path(out).expanduser()
    if path is not None and path.suffix not in ENDINGS:
        known = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise InputError(f"--out {path}: unknown kind of file '{path.suffix}'; end it with {known}")
    if path is not None and path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file in it")
    if precision not in ("fp32", "bf16", "auto"):
        raise InputError(f"--precision {precision}: unknown; use fp32, bf16 or auto")
    torch_device = pick_device(device)
    backbone = load_backbone(model)
    size = side_or_pair(parse_size(image_size)) if isinstance(image_size, str) else image_size
    how: dict[str, Any] = {"block": block, "pooling": pooling, "norm": norm, "image_size": size, "dtype": dtype}
    how |= {"batch_size": batch_size, "precision": resolve_precision(precision, torch_device)}
    spec = FeatureSpec.of(backbone.info, **how)
    run = Run(torch_device, spec.precision, reporter=reporter)
    source = open_source(data)
    source.stream()
    images = ImageSet(source, cache=False, channels=backbone.info.in_chans)
    announce(source, reporter)
    if path is None:
        features = compute_features(backbone, images, spec, run)
        reporter.done()
        return {
            "features": features.features,
            "indices": features.indices,
            "labels": None if images.labels is None else images.labels[features.indices],
            "class_names": images.class_names,
            **{key: getattr(spec, key) for key in ("block", "pooling", "norm")},
            "unreadable": [(name, why) for _, name, why in images.unreadable],
            "images_per_s": features.images_per_s,
        }
    return _to_file(path, backbone, images, spec, run, overwrite, model=name_of(model), data=name_of(data))


def _to_file(
    path: Path, backbone: Backbone, images: ImageSet, spec: FeatureSpec, run: Run, overwrite: bool, **names: str
) -> dict[str, Any]:
    info, classes, reporter = backbone.info, images.classes, run.reporter
    settings = {  # all that decides the bytes of the features: two runs of equal ones may share parts
        "version": __version__,
        "model_sha256": weights_sha256(backbone.model),
        "architecture": info.architecture,
        **asdict(spec),
        "transform": spec.transform(info),
        "device": run.device.type,
        "data_fingerprint": images.source.fingerprint(),
        "images": len(images),
    }
    manifest_file, parts = (path.with_name(path.name + ending) for ending in (".manifest.json", ".parts"))
    if path.exists() and not overwrite:
        stored = read_mapping(manifest_file)
        _refuse_difference(path, stored if stored or not parts.exists() else settings, settings)
        if stored.get("bytes") == path.stat().st_size:
            shutil.rmtree(parts, ignore_errors=True)
            reporter.message(f"{path} is complete already")
            return _result(path, manifest_file, stored, images_per_s=None)
    if overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    if parts.exists() and any(parts.iterdir()):
        _refuse_difference(parts, read_mapping(parts / "settings.json"), settings)
        reporter.message(f"going on with what is finished in {parts}")
    write_json(parts / "settings.json", settings)
    try:
        found = compute_features(backbone, images, spec, run, parts)
    except KeyboardInterrupt:
        if (parts / "done.json").exists() and not overwrite:  # which begins anew
            reporter.message(f"{parts} holds what is finished; the same command goes on from there")
        raise
    finally:
        if not (parts / "done.json").exists():  # nothing to go on with
            shutil.rmtree(parts, ignore_errors=True)
    reporter.done()
    tell_unreadable(images, reporter, f"they have no row, and are listed in {manifest_file}")
    manifest = settings | {
        **names,
        **{key: getattr(info, key) for key in ("family", "licence", "depth")},
        "data_description": images.description,
        "data_facts": images.facts(),
        "classes": None if classes is None else class_list(classes),
        "unreadable": [{"index": row, "name": name, "reason": why} for row, name, why in images.unreadable],
    }
    write_features(path, found, images, manifest)
    shape = list(found.features.shape)
    manifest |= {"rows": shape[0], "shape": shape, "file": path.name, "bytes": path.stat().st_size}
    if (beside := rows_file(path)) is not None:
        manifest["rows_file"] = beside.name
    write_json(manifest_file, manifest)
    shutil.rmtree(parts, ignore_errors=True)
    return _result(path, manifest_file, manifest, images_per_s=found.images_per_s)


def _refuse_difference(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise RunFolderError naming what differs between the features at ``path`` and those asked for."""
    if not stored:
        raise RunFolderError(f"{path}: is not the work of embed; choose another --out, or --overwrite to replace it")
    wanted = json_value(settings)
    changed = [f"{key}: {stored.get(key)} there, {wanted[key]} now" for key in wanted if stored.get(key) != wanted[key]]
    if changed:
        raise RunFolderError(
            f"{path}: holds features made with other settings ({'; '.join(changed[:3])}); "
            "choose another --out, or --overwrite to start anew"
        )


def _result(path: Path, manifest_file: Path, manifest: dict[str, Any], *, images_per_s: float | None) -> dict[str, Any]:
    shown = ("rows", "shape", "block", "pooling", "norm", "dtype", "model_sha256")
    return {
        "out": str(path),
        "manifest": str(manifest_file),
        **{key: manifest[key] for key in shown},
        "unreadable": len(manifest["unreadable"]),
        "images_per_s": images_per_s,
    }
