"""Turn a model source into a :class:`Backbone`, accounting for every tensor on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from torch import Tensor, nn

from mim_refiner.checkpoints.catalog import family_licence
from mim_refiner.checkpoints.detect import detect_family
from mim_refiner.checkpoints.families import Converted, Wishes
from mim_refiner.checkpoints.resolve import read_source
from mim_refiner.checkpoints.store import Contents, one_line
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.vit import check_image_size, create_vit
from mim_refiner.types import CheckpointReport, TensorRecord

_PROJECTION = "patch_embed.proj.weight"
_VIT_MODULES = ["vision_transformer", "deit"]  # timm modules whose models take dynamic image sizes as plain ViTs do


class PartialCheckpointWarning(UserWarning):
    """A checkpoint was loaded although it does not cover the encoder, or holds tensors that found no place."""


@dataclass(frozen=True)
class _Plan:
    """What loading a source means, tensor by tensor."""

    contents: Contents
    section: str
    family: str
    converted: Converted
    licence: str


def load_backbone(
    source: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    in_chans: int | None = None,
    strict: bool = True,
) -> Backbone:
    """Load an encoder, in eval mode, float32, on the CPU.

    ``source``: a checkpoint file, a timm folder (config.json + weights), a run folder with export/, a timm model name
    with its weights tag ("vit_base_patch16_224.mae"), or "hf-hub:owner/name".
    ``image_size`` (pixels; default: that of the file's position table) resamples the table as timm does.
    ``num_heads`` is needed for files of non-standard width: weights do not tell it. ``in_chans`` other than the
    file's adapts the patch projection. ``strict=False`` loads an incomplete file: a PartialCheckpointWarning says
    which tensors stay random.
    Raises CheckpointError (unreadable, unsafe, unknown, incomplete, non-finite) and InputError (unusable argument).
    """
    wishes = Wishes(_pair(image_size), num_heads, in_chans)
    plan = _plan(source, wishes)
    converted = plan.converted
    if converted.num_heads == 0:
        raise CheckpointError(
            f"{source}: {converted.arguments['depth']} blocks of width {converted.arguments['embed_dim']} do not "
            "tell the number of attention heads; pass num_heads="
        )
    with _untouched_random_state():
        model = _build(converted, plan.contents.source)
    records, missing, unplaced = _account(plan, model)
    if missing or unplaced:
        _complain(str(source), len(model.state_dict()), missing, unplaced, strict)
    _check_finite(converted.tensors, str(source))
    model.load_state_dict({name: converted.tensors[name] for name in _placed(records)}, strict=False)
    if wishes.image_size is not None:
        _resize(model, wishes.image_size, str(source))
    backbone = Backbone.wrap(
        model,
        family=plan.family,
        mean=_channels(converted.mean, in_chans),
        std=_channels(converted.std, in_chans),
        licence=plan.licence,
        coverage=_coverage(model, missing),
        source=str(source),
    )
    return backbone.eval()


def inspect_checkpoint(source: str | Path) -> CheckpointReport:
    """What ``source`` is and what :func:`load_backbone` would do with every tensor in it; builds no weights.

    An incomplete file is reported, not refused. Raises CheckpointError if it cannot be read safely or is of no known
    family.
    """
    plan = _plan(source, Wishes())
    converted = plan.converted
    known_heads = converted.num_heads != 0
    with torch.device("meta"):
        model = _build(converted if known_heads else replace(converted, num_heads=1), plan.contents.source)
    records, missing, unplaced = _account(plan, model)
    info = Backbone.wrap(model, family=plan.family, licence=plan.licence).info
    notes = list(converted.notes)
    if not known_heads:
        notes.append("the file does not tell the number of attention heads; pass num_heads= to load it")
    if unplaced:
        notes.append(f"{len(unplaced)} tensors have no place in the encoder: {_some(unplaced)}")
    return CheckpointReport(
        source=str(source),
        family=plan.family,
        architecture=info.architecture if known_heads else info.architecture.replace("heads=1,", "heads=?,"),
        embed_dim=info.embed_dim,
        depth=info.depth,
        num_heads=info.num_heads if known_heads else 0,
        patch_size=info.patch_size,
        image_size=info.image_size,
        num_prefix_tokens=info.num_prefix_tokens,
        licence=plan.licence,
        coverage=_coverage(model, missing),
        tensors=tuple(records),
        missing=tuple(missing),
        notes=tuple(notes),
    )


def _plan(source: str | Path, wishes: Wishes) -> _Plan:
    contents = read_source(source)
    family, section = detect_family(contents)
    converted = family.convert(contents, section, wishes)
    if wishes.in_chans is not None:
        converted = _adapt_channels(converted, wishes.in_chans)
    name = converted.family or family.name
    return _Plan(contents, section, name, converted, converted.licence or family_licence(name))


def _build(converted: Converted, where: str) -> Any:
    """The timm model of a conversion, at the file's own image size; CheckpointError if timm cannot build it."""
    arguments = dict(converted.arguments)
    if converted.num_heads > 0:
        arguments["num_heads"] = converted.num_heads
    try:
        if is_model_in_modules(converted.architecture.partition(".")[0], _VIT_MODULES):
            return create_vit(converted.architecture, **arguments)
        return timm.create_model(converted.architecture, pretrained=False, num_classes=0, **arguments)
    except (InputError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"{where}: timm cannot build '{converted.architecture}' as described ({one_line(error)}); "
            "correct the architecture in its config.json, or give the weight file alone"
        ) from error


def _account(plan: _Plan, model: nn.Module) -> tuple[list[TensorRecord], list[str], list[str]]:
    """Return (fate of every tensor, encoder tensors not provided, file tensors without a place).

    Raises CheckpointError for a tensor of the wrong shape.
    """
    converted, section = plan.converted, plan.contents.section(plan.section)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    records, unplaced = [], list(converted.unplaced)
    for target, tensor in converted.tensors.items():
        name = converted.origin[target]
        if target not in expected:
            unplaced.append(name)
            continue
        shape = tuple(tensor.shape)
        if shape != expected[target]:
            raise CheckpointError(
                f"{plan.contents.source}: {name} has shape {list(shape)}, the encoder needs {list(expected[target])}; "
                "the file does not fit its config or arguments (patch size, image size, channels)"
            )
        records.append(_placed_record(name, target, tuple(section[name].shape), shape))
    for name, reason in converted.dropped.items():
        records.append(TensorRecord(name, tuple(section[name].shape), "dropped", reason=reason))
    for name in unplaced:
        records.append(TensorRecord(name, tuple(section[name].shape), "dropped", reason="no place in the encoder"))
    records.extend(_records_of_other_sections(plan))
    missing = [name for name in expected if name not in converted.tensors]
    return records, missing, unplaced


def _placed_record(name: str, target: str, in_file: tuple[int, ...], shape: tuple[int, ...]) -> TensorRecord:
    if in_file != shape:
        return TensorRecord(name, in_file, "reshaped", target, f"from {list(in_file)} to {list(shape)}")
    return TensorRecord(name, in_file, "loaded" if name == target else "renamed", target)


def _records_of_other_sections(plan: _Plan) -> Iterator[TensorRecord]:
    for path, tensors in plan.contents.sections.items():
        if path == plan.section:
            continue
        reason = "optimiser state" if path.startswith("optimizer") else "not part of the encoder"
        for name, tensor in tensors.items():
            yield TensorRecord(f"{path}.{name}".lstrip("."), tuple(tensor.shape), "dropped", reason=reason)


def _placed(records: Iterable[TensorRecord]) -> list[str]:
    return [record.target for record in records if record.target is not None]


def _complain(source: str, total: int, missing: list[str], unplaced: list[str], strict: bool) -> None:
    """Refuse a file that does not fit (strict), or warn what stays random and what is ignored."""
    problems = []
    if missing:
        problems.append(f"gives {total - len(missing)} of the encoder's {total} tensors, missing: {_some(missing)}")
    if unplaced:
        problems.append(f"holds {len(unplaced)} tensors that the encoder has no place for: {_some(unplaced)}")
    text = f"{source}: {' and '.join(problems)}"
    if strict:
        raise CheckpointError(f"{text}; give the complete file (strict=False would leave gaps random)")
    consequence = "; the missing ones stay RANDOM" if missing else "; they are ignored"
    warnings.warn(text + consequence, PartialCheckpointWarning, stacklevel=3)


def _check_finite(tensors: dict[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values; the file is unusable, take an earlier one"
            )


def _adapt_channels(converted: Converted, in_chans: int) -> Converted:
    """Patch projection for another number of input channels, as timm does it.

    One channel gets the sum of all; otherwise channels repeat in order, scaled so that a constant image gives the
    same tokens on average.
    """
    if in_chans < 1:
        raise InputError(f"in_chans must be at least 1, got {in_chans}")
    weight = converted.tensors.get(_PROJECTION)
    if weight is None or weight.ndim != 4 or weight.shape[1] == in_chans:
        return converted
    channels = weight.shape[1]
    if in_chans == 1:
        adapted = weight.sum(dim=1, keepdim=True)
    else:
        adapted = weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)
    return replace(
        converted,
        arguments=converted.arguments | {"in_chans": in_chans},
        tensors=converted.tensors | {_PROJECTION: adapted},
    )


def _resize(model: Any, image_size: tuple[int, int], source: str) -> None:
    """Bring the position table to ``image_size`` (bicubic, antialiased)."""
    patch_embed = getattr(model, "patch_embed", None)
    if patch_embed is not None:
        check_image_size(image_size, patch_embed.patch_size)
        if tuple(patch_embed.img_size) == image_size:
            return
    if not hasattr(model, "set_input_size"):
        raise InputError(f"{source}: {type(model).__name__} cannot change its image size; leave image_size out")
    model.set_input_size(img_size=image_size)


def _coverage(model: nn.Module, missing: list[str]) -> float:
    total = len(model.state_dict())
    return (total - len(missing)) / total


def _channels(values: tuple[float, ...] | None, in_chans: int | None) -> tuple[float, ...] | None:
    """Mean or std of the file where it fits the channels; None = default."""
    return values if values is not None and in_chans in (None, len(values)) else None


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" (+{rest} more)" if rest > 0 else "")


@contextmanager
def _untouched_random_state() -> Iterator[None]:
    """Building a model draws random weights; the caller's seed must not notice."""
    with torch.random.fork_rng(devices=[]):
        yield
