"""Turn a model source into a :class:`Backbone`, accounting for every tensor on the way."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mim_refiner.checkpoints.adapters import SAVED_HEAD
from mim_refiner.checkpoints.build import MAX_PIXELS, adapt_channels, build
from mim_refiner.checkpoints.catalog import UNKNOWN_LICENCE, family_licence
from mim_refiner.checkpoints.detect import detect
from mim_refiner.checkpoints.families import Converted, View, Wishes
from mim_refiner.checkpoints.families.base import GUESS, reason_to_drop
from mim_refiner.checkpoints.families.described import own_family
from mim_refiner.checkpoints.families.plain_vit import heads_question
from mim_refiner.checkpoints.options import split_options
from mim_refiner.checkpoints.resolve import read_source
from mim_refiner.checkpoints.store import some
from mim_refiner.checkpoints.told import guesses, told, with_own_facts
from mim_refiner.errors import CheckpointError, InputError, MimRefinerError, one_line
from mim_refiner.files import errors_as, name_of, reading
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import RULES
from mim_refiner.reporting import number_of
from mim_refiner.types import CheckpointReport, TensorRecord, height_width

KeyMapLike = Mapping[str, Any] | str | Path | None
_LOGGER = logging.getLogger("mim_refiner")  # a logger without handlers writes warnings to stderr


class PartialCheckpointWarning(UserWarning):
    """A checkpoint was loaded although it does not cover the encoder, or holds tensors that found no place."""


def load_backbone(
    source: str | Path | nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    in_chans: int | None = None,
    strict: bool = True,
    encoder: str | None = None,
    key_map: KeyMapLike = None,
) -> Backbone:
    """Load an encoder, in eval mode, float32, on the CPU.

    ``source``: a checkpoint file, a timm or Hugging Face folder, a run folder with export/, a timm model name with its
    weights tag ("vit_base_patch16_224.mae"), or "hf-hub:owner/name"; or a timm module or Backbone, which is copied.
    ``image_size`` (pixels; default: that of the file's position table) resizes the table by the family's own rule
    (``info.position_rule``). ``num_heads`` is needed for files of non-standard width: weights do not tell it.
    ``in_chans`` other than the file's adapts the first convolution. ``encoder`` chooses one of several in the file
    ("teacher", "student", ...; by default the running average). ``key_map`` (mapping or YAML file, see
    families/described.py) names the tensors of an encoder of one's own. ``strict=False`` loads an incomplete file: a
    PartialCheckpointWarning says which tensors stay random. What had to be guessed (heads, image size, mean and std)
    is said on every load, by the logger "mim_refiner".
    Every option but strict can also stand in the source: "FILE::num_heads=4,encoder=student".
    Raises CheckpointError (unreadable, unsafe, unknown, incomplete, non-finite) and InputError (unusable argument, or
    one that is needed).
    """
    if isinstance(source, nn.Module):
        return _held(source, image_size)
    options = {"image_size": image_size, "num_heads": num_heads, "in_chans": in_chans, "encoder": encoder}
    found = _examine(source, key_map=key_map, **options)
    bare, converted, expected = found.report.source, found.converted, found.sketch.state_dict()
    if found.problem is not None and (strict or not found.is_gap):
        raise found.problem
    if found.is_gap:
        consequence = "the missing ones stay RANDOM" if found.report.missing else "they are ignored"
        gap = str(found.problem).partition(";")[0]
        warnings.warn(f"{gap}; {consequence}", PartialCheckpointWarning, stacklevel=2)
        _check_numbers(converted.tensors, expected, bare)
    wanted, given = (sum(tensor.numel() for tensor in part.values()) for part in (expected, converted.tensors))
    if wanted > 8 * given + 2**27:  # config and options take no memory that nothing fills
        raise CheckpointError(f"{bare}: its config is of a far larger encoder; take both from one source")
    with torch.random.fork_rng(devices=[]):  # timm draws initial weights
        model = build(converted, bare)
    tensors = {name: tensor for name, tensor in converted.tensors.items() if name in expected}
    model.load_state_dict(tensors, strict=False)
    backbone = _wrap(converted, model, bare, found.report.missing)
    if found.report.image_size != backbone.info.image_size:
        backbone.set_image_size(found.report.image_size)
    for note in found.report.notes:
        if note.startswith(GUESS) and os.environ.get("RANK", "0") == "0":
            _LOGGER.warning("note: %s: %s", bare, note)
    return backbone.eval()


def _held(given: nn.Module, image_size: int | tuple[int, int] | None) -> Backbone:
    """A copy of an encoder that a program holds: a Backbone, or a timm module, which loses its classifier."""
    model = copy.deepcopy(given)
    if not isinstance(model, Backbone):
        with contextlib.suppress(Exception):  # what has none keeps what it has
            model.reset_classifier(0)  # type: ignore[operator]
        facts = getattr(model, "pretrained_cfg", None) or {}
        model = Backbone.wrap(model, mean=facts.get("mean"), std=facts.get("std"), source=name_of(given))
    if image_size is not None:
        model.set_image_size(height_width(image_size))
    return model.float().cpu().eval()


def inspect_checkpoint(
    source: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    in_chans: int | None = None,
    encoder: str | None = None,
    key_map: KeyMapLike = None,
) -> CheckpointReport:
    """What ``source`` is and what :func:`load_backbone` would do with every tensor in it; builds no weights.

    The options are those of :func:`load_backbone`. A file that is understood but cannot be loaded (incomplete, heads
    unknown) is reported: ``problem`` is the line that loading ends with. Raises CheckpointError if it cannot be read
    safely or is of no known family, InputError for an unusable option.
    """
    options = {"image_size": image_size, "num_heads": num_heads, "in_chans": in_chans, "encoder": encoder}
    return _examine(source, key_map=key_map, **options).report


class _Examined(NamedTuple):
    """A source as far as it can be judged without building weights; ``problem``: the error that loading ends with."""

    report: CheckpointReport
    converted: Converted
    sketch: Any  # the model, without memory for its weights
    problem: MimRefinerError | None
    is_gap: bool  # tensors of file and encoder do not match, which strict=False allows


def _examine(given: str | Path, **options: Any) -> _Examined:
    source, asked = split_options(given)  # arguments win over what stands in the source
    asked |= {name: value for name, value in options.items() if value is not None}
    key_map = asked.pop("key_map", None)
    size = asked.get("image_size")
    size = asked["image_size"] = None if size is None else height_width(size)
    if size is not None and (min(size) < 1 or size[0] * size[1] > MAX_PIXELS):
        raise InputError(f"image_size {size[0]}x{size[1]} is no image size that an encoder takes; correct it")
    with reading(one_line(source, 300), "check it, or take the file from its source again", CheckpointError):
        contents = read_source(source)
    own = None if key_map is None else own_family(key_map)
    wishes = told(Wishes(**asked), contents)
    remedy = "take the files from their source again"
    # Shapes and config entries of a damaged file can fail anywhere; all mean the same to the user.
    with errors_as(CheckpointError, f"{contents.source}: its tensors or its config.json are of no encoder", remedy):
        family, view = detect(contents, wishes, own)
        converted = with_own_facts(family.convert(view, wishes), contents, by_key_map=key_map is not None)
        converted = replace(converted, family=converted.family or family.name)
        if wishes.in_chans is not None:
            converted = adapt_channels(converted, wishes.in_chans)
    with torch.device("meta"):  # shapes are compared before any memory is taken
        sketch = build(replace(converted, num_heads=converted.num_heads or 1), contents.source)
    expected = sketch.state_dict()
    records, missing, unplaced = _fates(view, converted, expected)
    backbone = _wrap(converted, sketch, source, missing)
    problem: MimRefinerError | None = None
    heads_known, fits = converted.num_heads != 0, not (missing or unplaced)
    if not heads_known:
        problem = InputError(f"{source}: {heads_question(converted.arguments)}")
    elif not fits:
        problem = _gap(source, len(expected), missing, unplaced)
    else:
        try:
            _check_numbers(converted.tensors, expected, source)
            if size is not None:
                backbone.check_new_size(size)
        except MimRefinerError as error:
            problem = error
    facts = vars(backbone.info) | {"image_size": size or backbone.info.image_size}
    if not heads_known:
        facts |= {"num_heads": 0, "architecture": facts["architecture"].replace("heads=1,", "heads=?,")}
    report = CheckpointReport(
        **facts,
        tensors=tuple(records),
        missing=tuple(missing),
        notes=tuple(_notes(view, converted, backbone, unplaced)),
        problem="" if problem is None else str(problem),
        encoder=view.label,
        encoders=view.encoders,
    )
    return _Examined(report, converted, sketch, problem, heads_known and not fits)


def _wrap(converted: Converted, model: Any, source: str, missing: Sequence[str]) -> Backbone:
    family, total = converted.family or "", len(model.state_dict())
    licence, coverage = converted.licence or family_licence(family), (total - len(missing)) / total
    facts = {name: getattr(converted, name) for name in ("mean", "std", "position_rule", "pooling", "image_size")}
    return Backbone.wrap(model, family=family, licence=licence, coverage=coverage, source=source, **facts)


def _notes(view: View, converted: Converted, backbone: Backbone, unplaced: list[str]) -> list[str]:
    info = backbone.info
    notes = [*converted.notes, *guesses(converted, view.contents, info.in_chans), *([view.note] if view.note else [])]
    if len(view.encoders) > 1:
        others = ", ".join(other for other in view.encoders if other != view.label)
        notes.append(f"this is the encoder '{view.label}'; the file also holds {others}: choose by --encoder")
    if converted.num_heads == 0:
        notes.append("the file does not tell the number of attention heads; pass num_heads= to load it")
    if unplaced:
        notes.append(f"no place in the encoder for {number_of(len(unplaced), 'tensors')}: {some(unplaced)}")
    notes.append(f"positions at other image sizes: {RULES[info.position_rule]}")
    if converted.licence is None and info.licence != UNKNOWN_LICENCE:
        notes.append("licence: that of the family's published weights; weights trained by others carry their own")
    return notes


def _gap(source: str, total: int, missing: list[str], unplaced: list[str]) -> CheckpointError:
    """What file and encoder do not share, and what to do."""
    problems = []
    if missing:
        problems.append(f"gives {total - len(missing)} of the encoder's {total} tensors, missing: {some(missing)}")
    if unplaced:
        unknown = number_of(len(unplaced), "tensors that the encoder has no place for")
        problems.append(f"holds {unknown}: {some(unplaced)}")
    advice = "give the complete file (strict=False would leave gaps random)"
    if not missing:
        advice = "if the encoder works without them, name them under drop: in a key map (--key-map)"
    return CheckpointError(f"{source}: {' and '.join(problems)}; {advice}")


def _check_numbers(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """CheckpointError for the first tensor whose numbers are not real and finite."""
    for name, tensor in tensors.items():
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{source}: {name} holds {kind} numbers instead of floats; save the weights as floats"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values; the file is unusable, take an earlier one"
            )


def _fates(
    view: View, converted: Converted, expected: Mapping[str, Tensor]
) -> tuple[list[TensorRecord], list[str], list[str]]:
    """(fate of every tensor, encoder tensors not provided, file tensors without a place); refuses a wrong shape."""
    given, reasons = converted.tensors, converted.reasons
    section = view.contents.sections[view.section]
    placed = {name: target for name, target in converted.origin.items() if target in given}
    left: dict[str, str | None] = {}
    left |= dict.fromkeys(section, f"outside the encoder, whose names start with '{view.prefix}'")
    left |= {name: reason for short, name in view.beside.items() if (reason := reason_to_drop(short, reasons))}
    left |= {name: reason_to_drop(short, reasons) for short, name in view.names.items()}
    left = {name: reason for name, reason in left.items() if name not in placed}
    left |= {name: None for name, target in placed.items() if target not in expected}
    records, parts = [], Counter(placed.values())
    for name, target in placed.items():
        if name in left:
            continue
        shape, wanted = given[target].shape, expected[target].shape
        if shape != wanted:
            raise CheckpointError(
                f"{view.where}: {name} has shape {list(shape)}, the encoder needs {list(wanted)}; "
                "the file does not fit its config or arguments (patch size, image size, channels)"
            )
        records.append(_placed(name, target, tuple(section[name].shape), tuple(shape), parts[target]))
    for name, reason in left.items():
        why = reason or "no place in the encoder"
        records.append(TensorRecord(name, tuple(section[name].shape), "dropped", reason=why))
    for path, tensors in view.contents.sections.items():
        why = _why_not(path, view.encoders)
        for name, tensor in tensors.items() if path != view.section else ():
            records.append(TensorRecord(f"{path}.{name}".lstrip("."), tuple(tensor.shape), "dropped", reason=why))
    missing = [name for name in expected if name not in given]
    return records, missing, [name for name, reason in left.items() if reason is None]


def _placed(name: str, target: str, in_file: tuple[int, ...], shape: tuple[int, ...], parts: int) -> TensorRecord:
    if parts > 1:
        return TensorRecord(name, in_file, "reshaped", target, f"one of {parts} that are joined to {list(shape)}")
    if in_file != shape:
        return TensorRecord(name, in_file, "reshaped", target, f"from {list(in_file)} to {list(shape)}")
    return TensorRecord(name, in_file, "loaded" if name == target else "renamed", target)


def _why_not(path: str, encoders: tuple[str, ...]) -> str:
    first, last = path.split(".")[0], path.split(".")[-1].lstrip("_")
    if path == SAVED_HEAD:
        return "classifier that was trained with the adapter"
    if first.startswith("opt"):
        return "optimiser state"
    if last in encoders:
        return f"another encoder of the file, choose it by --encoder {last}"
    if "loss" in first or first in ("scaler", "amp_scaler", "lr_scheduler", "criterion"):
        return "state of the training"
    return "not part of the encoder"
