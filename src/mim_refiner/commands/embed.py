"""``embed``: features of a data set to one file, with a manifest that says what they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_refiner._version import __version__
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.checkpoints.options import parse_size
from mim_refiner.commands.inputs import announce
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import InputError, MimRefinerError
from mim_refiner.evaluation.embedding import FeatureSpec, compute_parts
from mim_refiner.evaluation.feature_files import assemble, check_ending, class_list, rows_file
from mim_refiner.evaluation.feature_parts import PartFolder, read_json, refuse_difference
from mim_refiner.files import name_of, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import NullReporter, Reporter
from mim_refiner.types import ImageSize, side_or_pair

LISTED_UNREADABLE = 5  # in messages; the manifest has them all


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
    final norm. ``image_size``: a side in pixels,
    (height, width) or "192x256"; default the encoder's own. ``precision`` of the forward pass: fp32, bf16, auto.
    ``dtype`` of the file: float32, float16.

    ``<out>.manifest.json`` says what the rows are. Finished parts stay in ``<out>.parts/`` until the file is complete,
    so the same call after an interruption goes on and gives the same bytes; once complete it does nothing.
    Unreadable images have no row and are listed in the manifest. Returns what was written and images/s.
    Raises MimRefinerError with one line on bad input, or for an ``out`` made with other settings (``overwrite``
    replaces it).
    """
    reporter = reporter or NullReporter()
    path = None if out is None else Path(out).expanduser()
    _check_arguments(path, precision)
    torch_device = pick_device(device)
    backbone = load_backbone(model)
    spec = FeatureSpec.choose(
        backbone.info,
        block=block,
        pooling=pooling,
        norm=norm,
        image_size=side_or_pair(parse_size(image_size)) if isinstance(image_size, str) else image_size,
        batch_size=batch_size,
        precision=resolve_precision(precision, torch_device),
        dtype=dtype,
    )
    source = open_source(data)
    source.stream()
    images = ImageSet(source, cache=False, channels=backbone.info.in_chans)
    announce(source, reporter)
    if path is None:
        return _in_memory(backbone, images, spec, torch_device, reporter)
    settings = _settings(spec, backbone, images, torch_device.type)
    manifest_file = path.with_name(path.name + ".manifest.json")
    parts = PartFolder(path.with_name(path.name + ".parts"))
    if path.exists() and not overwrite:
        stored = read_json(manifest_file)
        refuse_difference(path, stored if stored or not parts.path.exists() else settings, settings)
        if stored is not None and stored.get("bytes") == path.stat().st_size:
            parts.remove()
            reporter.message(f"{path} is complete already")
            return _result(path, manifest_file, stored, images_per_s=None)
    if parts.open(settings, overwrite=overwrite):
        reporter.message(f"going on with {parts.count()} finished parts in {parts.path}")
    try:
        speed = compute_parts(backbone, images, spec, parts, Run(torch_device, spec.precision, reporter=reporter))
    except MimRefinerError:
        if not parts.count():
            parts.remove()
        raise
    reporter.done()
    manifest = _assemble(path, parts, images, settings | _facts(backbone, model, data, images), reporter)
    return _result(path, manifest_file, manifest, images_per_s=speed)


def _assemble(
    path: Path, parts: PartFolder, images: ImageSet, manifest: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """The file and its manifest from the parts, which then go; returns the manifest."""
    manifest_file = path.with_name(path.name + ".manifest.json")
    unreadable = [{"index": index, "name": name, "reason": why} for index, name, why in images.unreadable_items()]
    _tell_unreadable(unreadable, manifest_file, reporter)
    manifest |= {"unreadable": unreadable}
    shape = assemble(path, parts, images, manifest)
    beside = rows_file(path)
    more = {"rows": shape[0], "shape": list(shape), "file": path.name, "bytes": path.stat().st_size}
    manifest |= more | ({} if beside is None else {"rows_file": beside.name})
    write_json(manifest_file, manifest)
    parts.remove()
    return manifest


def _in_memory(
    backbone: Backbone, images: ImageSet, spec: FeatureSpec, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        parts = PartFolder(Path(scratch))
        speed = compute_parts(backbone, images, spec, parts, Run(device, spec.precision, reporter=reporter))
        rows = list(parts.all())
    reporter.done()
    indices = np.concatenate([part.indices for part in rows])
    return {
        "features": np.concatenate([part.features for part in rows if part.features is not None]),
        "indices": indices,
        "labels": None if images.labels is None else images.labels[indices],
        "class_names": images.class_names,
        "block": spec.block,
        "pooling": spec.pooling,
        "norm": spec.norm,
        "unreadable": images.unreadable,
        "images_per_s": speed,
    }


def _check_arguments(path: Path | None, precision: str) -> None:
    if path is not None:
        check_ending(path)
        if path.is_dir():
            raise InputError(f"--out {path}: is a folder; name a file in it")
    if precision not in ("fp32", "bf16", "auto"):
        raise InputError(f"--precision {precision}: unknown; use fp32, bf16 or auto")


def _settings(spec: FeatureSpec, backbone: Backbone, images: ImageSet, device: str) -> dict[str, Any]:
    """Everything that decides the bytes of the features; two runs of equal settings may share parts."""
    return {
        "version": __version__,
        "model_sha256": weights_sha256(backbone.model),
        "architecture": backbone.info.architecture,
        "block": spec.block,
        "pooling": spec.pooling,
        "norm": spec.norm,
        "transform": spec.transform(backbone.info),
        "precision": spec.precision,
        "dtype": spec.dtype,
        "device": device,
        "batch_size": spec.batch_size,
        "part_images": spec.part_images,
        "data_fingerprint": images.source.fingerprint(),
        "images": len(images),
    }


def _facts(backbone: Backbone, model: object, data: object, images: ImageSet) -> dict[str, Any]:
    info = backbone.info
    return {
        "model": name_of(model),
        "family": info.family,
        "licence": info.licence,
        "depth": info.depth,
        "data": name_of(data),
        "data_description": images.description,
        "data_facts": images.facts(),
        "classes": None if images.classes is None else class_list(images.classes),
    }


def _tell_unreadable(unreadable: list[dict[str, Any]], manifest: Path, reporter: Reporter) -> None:
    if unreadable:
        some = "; ".join(f"{item['name']}: {item['reason']}" for item in unreadable[:LISTED_UNREADABLE])
        more = ", ..." if len(unreadable) > LISTED_UNREADABLE else ""
        reporter.message(f"{len(unreadable)} unreadable images have no row ({some}{more}); listed in {manifest}")


def _result(path: Path, manifest_file: Path, manifest: dict[str, Any], *, images_per_s: float | None) -> dict[str, Any]:
    shown = ("rows", "shape", "block", "pooling", "norm", "dtype", "model_sha256")
    return {
        "out": str(path),
        "manifest": str(manifest_file),
        **{key: manifest[key] for key in shown},
        "unreadable": len(manifest["unreadable"]),
        "images_per_s": images_per_s,
    }
