"""``export``: an encoder in a format that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.checkpoints.options import bare_source
from mim_refiner.commands.inputs import open_images
from mim_refiner.core.device import pick_device
from mim_refiner.errors import InputError, did_you_mean
from mim_refiner.export.hub import check_repository
from mim_refiner.export.hub import push_to_hub as upload
from mim_refiner.export.huggingface import HUGGING_FACE
from mim_refiner.export.onnx import ONNX
from mim_refiner.export.refiner import REFINER
from mim_refiner.export.timm import TIMM
from mim_refiner.export.writing import check_images, check_target, source_facts, write_export
from mim_refiner.files import name_of
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter, listener

FORMATS = {format.name: format for format in (TIMM, HUGGING_FACE, ONNX, REFINER)}


def export(
    *,
    model: str,
    out: str,
    format: str = "timm",
    block: int | None = None,
    pooling: str | None = None,
    norm: bool | None = None,
    batch: str = "dynamic",
    image_size: int | None = None,
    data: Any = None,
    push_to_hub: str | None = None,
    private: bool = False,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write ``model`` to the folder ``out``, run the exported model on images, and compare it with the encoder.

    ``format``: "timm" (``timm.create_model("local-dir:...")``), "hf" (``AutoModel.from_pretrained``), "onnx" (a graph
    for onnxruntime), "refiner" (state dict of the published MIM-Refiner checkpoints).
    ``block``, ``pooling`` and ``norm``: the features that the model card recommends and that an ONNX graph gives (its
    pooling may also be "tokens", all of them). None: what the source itself recommends, else the last block
    without the final norm, pooled as the encoder's authors do.
    ``batch`` of an ONNX graph: "dynamic", or a number of images. ``image_size``: pixels, resizes the position table.
    ``data``: images for the comparison (default: some embedded in the package).
    ``push_to_hub``: "owner/name", uploads the finished folder to the Hugging Face Hub (``private``: a repository made
    for it is not public). ``device`` is checked and not used: exports are made and compared on the CPU.
    Returns the report with the largest difference. Raises MimRefinerError on bad input, and when the exported model
    differs by more than 1e-6 (timm, refiner), 1e-5 (hf) or 1e-4 (onnx) of the largest value; then nothing is written.
    """
    reporter = listener(reporter)
    if format not in FORMATS:
        raise InputError(f"--format {format}: unknown format; use {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    if push_to_hub:
        check_repository(push_to_hub)
    pick_device(device)
    given = isinstance(model, str | Path)
    bare = bare_source(model) if given else name_of(model)
    source, place = Path(bare.removeprefix("local-dir:")).expanduser(), Path(out)
    if source.exists() and place.resolve() in (source.resolve(), (source / "export").resolve()):
        raise InputError(f"--out {out}: is the folder that --model is read from; choose another")
    check_target(place.absolute())
    backbone = load_backbone(model, image_size=image_size)
    recorded = source_facts(bare) if given else {}  # of an earlier export
    facts = _features(backbone, recorded, {"block": block, "pooling": pooling, "norm": norm})
    card = dict(recorded.get("card") or {})
    card.setdefault("base", recorded.get("base") or Path(bare).name if "hub:" not in bare else bare)
    if format == "onnx":
        if batch != "dynamic" and (not batch.isdecimal() or int(batch) < 1):
            raise InputError(f"--batch {batch}: give 'dynamic' or a number of images from 1")
        facts["batch"] = batch if batch == "dynamic" else int(batch)
    elif facts["pooling"] == "tokens":
        raise InputError(f"--pooling tokens is for --format onnx; leave it out, {format} always gives all tokens")
    images = check_images(backbone.info, open_images(data, reporter, channels=backbone.info.in_chans) if data else None)
    report = write_export(FORMATS[format], backbone, out, card=card, facts=facts, images=images)
    features = {key: facts[key] for key in ("block", "pooling", "norm")}
    if push_to_hub:
        report["repository"] = upload(out, push_to_hub, private=private)
    reporter.done()
    return report | {"features": features}


def _features(backbone: Backbone, recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Those to recommend: asked for, else recorded, else the usual ones. InputError where the encoder has none such."""
    info = backbone.info
    facts: dict[str, Any] = {"block": -1, "pooling": info.pooling if info.has_cls else "mean", "norm": False}
    for known in (recorded, asked):
        facts |= {key: known[key] for key in facts if known.get(key) is not None}
    if facts["pooling"] == "cls" and not info.has_cls:
        raise InputError(f"--pooling cls: {info.architecture} has no class token; use mean")
    if facts["pooling"] not in ("cls", "mean", "tokens"):
        raise InputError(f"--pooling {facts['pooling']}: unknown; use cls, mean or tokens")
    backbone.resolve_blocks([facts["block"]])
    return facts
