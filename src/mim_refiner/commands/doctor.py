"""``doctor``: look at the data (and the model) before hour nine."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.commands.inputs import announce
from mim_refiner.commands.refine import refine
from mim_refiner.core.device import pick_device
from mim_refiner.core.processes import started_as
from mim_refiner.data.doctor import KINDS, Finding, Scan, scan
from mim_refiner.data.duplicates import exact_duplicates, exact_matches, near_duplicates, near_matches
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.labels import printable
from mim_refiner.data.name_lists import list_lines
from mim_refiner.data.sources import ImageSource, open_source
from mim_refiner.errors import InputError, MimRefinerError
from mim_refiner.files import name_of, write_bytes, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter, listener, number_of
from mim_refiner.training.domains import DOMAINS, suggest_domain
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.recipes import refine_recipe

LIST_NAME = "exclude.txt"
WHITE = 230  # of 255: paper


def doctor(
    *,
    data: Any,
    model: str | None = None,
    test: Any = None,
    out: str | None = None,
    recipe: str | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Check the images ``data`` (and an encoder ``model``) before a run; changes nothing.

    ``test``: images that must not be among ``data``. ``out``: folder for doctor.json and exclude.txt, the list that
    ``refine --exclude`` takes. ``recipe``: the one to estimate cost by. Returns the findings with counts, classes,
    statistics and estimates. Raises DataError or CheckpointError when a source cannot be opened at all.
    """
    reporter = listener(reporter)
    started = time.perf_counter()
    target = pick_device(device)
    backbone = load_backbone(model) if model else None
    channels = 3 if backbone is None else backbone.info.in_chans
    source = open_source(data)
    held_out = open_source(test) if test else None
    found = _scan(source, "images", reporter, channels)
    seconds = time.perf_counter() - started
    findings = found.findings + _duplicates(found, source)
    if held_out is not None:
        findings += _leaks(found, _scan(held_out, "test images", reporter, channels), source, held_out)
    findings.sort(key=lambda finding: (finding.index, list(KINDS).index(finding.kind)))
    counts = Counter(finding.kind for finding in findings)
    left_out = sorted({finding.index for finding in findings if finding.exclude})
    result: dict[str, Any] = {
        "data": source.description,
        **{key: value for key, value in source.facts().items() if key not in ("source", "classes")},
        "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
        "to_exclude": len(left_out),
        "findings": [vars(finding) | {"exclude": finding.exclude} for finding in findings],
        "pixels": _pixels(found),
        "augmentations": _suggested(found, source, channels),
        "classes": _classes(source),
        "disk_free_gb": round(shutil.disk_usage(Path(out) if out and Path(out).exists() else Path.cwd()).free / 1e9, 1),
        "seconds": round(time.perf_counter() - started, 2),
        "images_per_s": round(len(source) / max(seconds, 1e-9)),
    }
    if model and backbone is not None:
        reporter.phase("model", 0)
        result["model"] = check_model(model, backbone, data, found, recipe=recipe, device=target)
    if out:
        result["exclude_list"] = str(write_bytes(Path(out) / LIST_NAME, _list_text(data, findings)))
        write_json(Path(out) / "doctor.json", result)
    reporter.done()
    return result


def _scan(source: ImageSource, what: str, reporter: Reporter, channels: int) -> Scan:
    announce(source, reporter)
    reporter.phase(what, len(source))
    source.stream()
    return scan(source, lambda done: reporter.progress(done, {}), channels=channels)


def _duplicates(found: Scan, source: ImageSource) -> list[Finding]:
    """Exact duplicates, and near ones among the images that are not exact duplicates."""
    structured, labels, findings = set(_structured(found).tolist()), source.labels, []
    exact = [pair for pair in exact_duplicates(found.digests) if pair[1] in structured]
    singles = np.array(sorted(structured.difference(row for _, row in exact)), dtype=np.int64)
    near = [(int(singles[a]), int(singles[b])) for a, b in near_duplicates(found.thumbs[singles])]
    for kind, pairs in (("exact duplicate", exact), ("near duplicate", near)):
        for first, row in pairs:
            index, other = int(found.rows[row]), int(found.rows[first])
            relabelled = labels is not None and labels[index] != labels[other]
            detail = f"of {source.name(other)}{', with another label' if relabelled else ''}"
            findings.append(Finding(kind, index, source.name(index), detail))
    return findings


def _leaks(found: Scan, test: Scan, source: ImageSource, held_out: ImageSource) -> list[Finding]:
    exact = exact_matches(found.digests, test.digests)
    known = {row for _, row in exact}
    ours, theirs = _structured(found), _structured(test)
    close = near_matches(found.thumbs[ours], test.thumbs[theirs])
    near = [(int(theirs[other]), int(ours[row])) for other, row in close if int(ours[row]) not in known]
    findings = []
    for how, pairs in (("same pixels as", exact), ("nearly", near)):
        for other, row in pairs:
            index = int(found.rows[row])
            detail = f"{how} {held_out.name(int(test.rows[other]))}"
            findings.append(Finding("leak from test", index, source.name(index), detail))
    return findings


def _structured(found: Scan) -> NDArray[np.int64]:
    """Rows to compare: a one-coloured image, which is a finding already, would be near to many of about its tint."""
    constant = [finding.index for finding in found.findings if finding.kind == "constant"]
    return np.flatnonzero(~np.isin(found.rows, constant))


def _pixels(found: Scan) -> dict[str, Any]:
    """Size and colour of the images that could be decoded."""
    if not len(found.rows):
        return {"decoded": 0}
    width, height = np.median(found.sizes, axis=0)
    return {
        "decoded": len(found.rows),
        "median_size": f"{width:.0f}x{height:.0f}",
        "smallest_side": int(found.sizes.min()),
        "largest_side": int(found.sizes.max()),
        "gray_share": round(found.gray / len(found.rows), 4),
        "mean": [round(value, 4) for value in found.mean],
        "std": [round(value, 4) for value in found.std],
    }


def _suggested(found: Scan, source: ImageSource, channels: int) -> dict[str, Any] | None:
    """The augmentation set that channels, bits, shape and background speak for; None where nothing could be decoded."""
    if not len(found.rows):
        return None
    first = decode_image(source.read(int(found.rows[0])), channels)[0]
    colourless = channels == 3 and found.gray >= 0.95 * len(found.rows)
    aspect = float(np.median(found.sizes.max(1) / found.sizes.min(1)))
    white = float((found.thumbs.min(axis=-1) >= WHITE).mean())
    name = suggest_domain(1 if colourless else channels, 8 * first.dtype.itemsize, aspect, white)
    moments = "" if channels == 3 else " --set normalization=data"
    return {"domain": name, "why": DOMAINS[name].reason, "use": f"refine --set domain={name}{moments}"}


def _classes(source: ImageSource) -> dict[str, Any] | None:
    """Balance of the classes; None without labels."""
    if source.classes is None:
        return None
    names, counts, notes = source.classes.names, np.bincount(source.classes.numbers), []
    least, most = int(counts.min()), int(counts.max())
    sizes: dict[str, Any] = {"images_of_each": least}
    if least < most:
        sizes = {"smallest": f"{names[counts.argmin()]} ({least})", "largest": f"{names[counts.argmax()]} ({most})"}
    if most >= 10 * least:
        notes.append("unbalanced: accuracy will mostly tell of the large classes")
    if source.classes.absent:
        notes.append(f"without an image: {number_of(source.classes.absent, 'class names')}")
    if (counts < 5).any():
        notes.append(f"fewer than 5 images in {number_of(int((counts < 5).sum()), 'classes')}: too few to measure on")
    return {"classes": len(names), **sizes, "ratio": round(most / least, 2), "notes": notes}


def _list_text(data: object, findings: Sequence[Finding]) -> bytes:
    """One line an image to leave out."""
    reasons: dict[tuple[int, str], list[str]] = {}
    for finding in findings:
        if finding.exclude:
            reasons.setdefault((finding.index, finding.name), []).append(f"{finding.kind} {finding.detail}".strip())
    head = f"# images to leave out of {printable(name_of(data))}; for: mim-refiner refine --exclude\n"
    head += "# number, name, reason\n"
    return head.encode() + list_lines((*image, "; ".join(why)) for image, why in reasons.items())


def check_model(
    model: Any, backbone: Backbone, data: Any, found: Scan, *, recipe: str | None, device: torch.device
) -> dict[str, Any]:
    """Say what the encoder ``backbone`` covers, how it fits the images, and what refining it would cost here.

    What ``refine --plan`` says of the same; a loaded machine gives a high time. Raises RecipeError for an unknown
    ``recipe``.
    """
    report = inspect_checkpoint(model) if isinstance(model, str | Path) else None
    info, images = backbone.info, len(found.rows)
    chosen, cost = refine_recipe(recipe, image_size=max(info.image_size), images=images), dict[str, Any]()
    encoder = sum(parameter.nbytes for parameter in backbone.parameters())
    how: dict[str, Any] = {"recipe": recipe, "device": str(device), "reporter": Reporter()}
    try:
        if started_as().world_size > 1:  # a plan is made by all of them, doctor by the first alone
            raise InputError("doctor tells no cost in several processes; use refine --plan")
        plan = refine(data=data, model=backbone, out="", plan=True, **how)["plan"]
        images, sizes = plan["images"], plan["bytes"]
        chosen = refine_recipe(recipe, image_size=max(info.image_size), images=images)
        checkpoints = (sizes["state"] - sizes["gradients"]) * chosen.keep_checkpoints
        cost = {
            "estimated_hours": round(plan["hours"], 2),
            "training_memory_gb": round(sizes["peak"] / 1e9, 2),
            "free_memory_gb": None if sizes["free"] is None else round(sizes["free"] / 1e9, 2),
            "micro_batch": plan["setting"]["micro_batch"],
            "disk_gb": round((checkpoints + encoder) / 1e9, 2),
            "advice": plan["to_change"],
        }
    except MimRefinerError as error:  # what a run would end with
        cost = {"problem": str(error)}
    return {
        "source": name_of(model),
        **{key: getattr(info, key) for key in ("family", "architecture", "coverage", "licence")},
        "image_size": f"{info.image_size[0]}x{info.image_size[1]}",
        "recipe": chosen.name,
        "notes": [*(report.notes if report else ()), *_fit_notes(backbone, found, images, chosen)],
        **cost,
    }


def _fit_notes(backbone: Backbone, found: Scan, images: int, recipe: RefineRecipe) -> list[str]:
    notes, size = [], backbone.info.image_size
    share = np.median((found.sizes / size[::-1]).min(axis=1)) if len(found.sizes) else 1.0  # width to width
    if share < 0.5:
        enlarged = f"images are enlarged {1 / share:.1f} times to {size[0]}x{size[1]} px"
        notes.append(f"{enlarged}: they show less than the encoder expects")
    images_here = number_of(images, "images")
    if images < recipe.batch_size:
        notes.append(f"batch_size {recipe.batch_size} is larger than the {images_here}; set a smaller one")
    elif images < 10 * recipe.batch_size:
        steps = number_of(images // recipe.batch_size, "steps an epoch")
        notes.append(f"{images_here} are {steps}; a smaller batch_size learns more")
    return notes
