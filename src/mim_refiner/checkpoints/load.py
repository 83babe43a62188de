"""Turn a model source into a :class:`Backbone`, accounting for every tensor on the way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.accounting import Plan, account, coverage, some
from mim_refiner.checkpoints.build import adapt_channels, build, untouched_random_state
from mim_refiner.checkpoints.catalog import UNKNOWN_LICENCE, family_licence
from mim_refiner.checkpoints.detect import detect
from mim_refiner.checkpoints.families import ASKED, Converted, Wishes
from mim_refiner.checkpoints.families.own import own_family
from mim_refiner.checkpoints.families.timm_format import OWN_FACTS
from mim_refiner.checkpoints.options import split_options
from mim_refiner.checkpoints.resolve import read_source
from mim_refiner.checkpoints.store import Contents, one_line
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import RULES
from mim_refiner.types import CheckpointReport

KeyMapLike = Mapping[str, Any] | str | Path | None


class PartialCheckpointWarning(UserWarning):
    """A checkpoint was loaded although it does not cover the encoder, or holds tensors that found no place."""


def load_backbone(
    source: str | Path,
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
    weights tag ("vit_base_patch16_224.mae"), or "hf-hub:owner/name".
    ``image_size`` (pixels; default: that of the file's position table) resizes the table by the family's own rule
    (``info.position_rule``). ``num_heads`` is needed for files of non-standard width: weights do not tell it.
    ``in_chans`` other than the file's adapts the first convolution. ``encoder`` chooses one of several in the file
    ("teacher", "student", ...; by default the running average). ``key_map`` (mapping or YAML file, see families/own.py)
    names the tensors of an encoder of one's own. ``strict=False`` loads an incomplete file: a
    PartialCheckpointWarning says which tensors stay random.
    Every option but strict can also stand in the source: "FILE::num_heads=4,encoder=student".
    Raises CheckpointError (unreadable, unsafe, unknown, incomplete, non-finite) and InputError (unusable argument, or
    one that is needed).
    """
    source, wishes, key_map = _merge(source, Wishes(_pair(image_size), num_heads, in_chans, encoder), key_map)
    plan = _plan(source, wishes, key_map)
    converted = plan.converted
    if converted.num_heads == 0:
        raise InputError(
            f"{source}: {converted.arguments['depth']} blocks of width {converted.arguments['embed_dim']} do not "
            "tell the number of attention heads; pass num_heads= (--num-heads)"
        )
    with torch.device("meta"):  # shapes are compared before any memory is taken
        sketch = build(converted, plan.contents.source)
    _, missing, unplaced = account(plan, sketch)
    if missing or unplaced:
        _complain(str(source), len(sketch.state_dict()), missing, unplaced, strict)
    _check_numbers(converted.tensors, sketch, str(source))
    with untouched_random_state():
        model = build(converted, plan.contents.source)
    expected = sketch.state_dict()
    model.load_state_dict({name: t for name, t in converted.tensors.items() if name in expected}, strict=False)
    backbone = _wrap(plan, model, source=str(source), coverage=coverage(model, missing))
    if wishes.image_size is not None:
        backbone.set_image_size(wishes.image_size)
    return backbone.eval()


def inspect_checkpoint(
    source: str | Path,
    *,
    num_heads: int | None = None,
    in_chans: int | None = None,
    encoder: str | None = None,
    key_map: KeyMapLike = None,
) -> CheckpointReport:
    """What ``source`` is and what :func:`load_backbone` would do with every tensor in it; builds no weights.

    The options are those of :func:`load_backbone`. An incomplete file is reported, not refused. Raises CheckpointError
    if it cannot be read safely or is of no known family, InputError for an unusable option.
    """
    source, wishes, key_map = _merge(source, Wishes(None, num_heads, in_chans, encoder), key_map)
    plan = _plan(source, wishes, key_map)
    converted = plan.converted
    known_heads = converted.num_heads != 0
    with torch.device("meta"):
        model = build(converted if known_heads else replace(converted, num_heads=1), plan.contents.source)
    records, missing, unplaced = account(plan, model)
    info = _wrap(plan, model, source=str(source), coverage=coverage(model, missing)).info
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
        coverage=info.coverage,
        tensors=tuple(records),
        missing=tuple(missing),
        notes=_notes(plan, info.position_rule, unplaced),
        encoder=plan.view.label,
        encoders=plan.encoders,
        in_chans=info.in_chans,
        has_cls=info.has_cls,
        mean=info.mean,
        std=info.std,
        position_rule=info.position_rule,
        norm_eps=info.norm_eps,
        pooling=info.pooling,
    )


def _merge(source: str | Path, wishes: Wishes, key_map: KeyMapLike) -> tuple[str, Wishes, KeyMapLike]:
    """(source, wishes, key map) with the options that stand in the source; arguments win over them."""
    bare, options = split_options(source)
    merged = Wishes(
        image_size=wishes.image_size or options.image_size,
        num_heads=wishes.num_heads or options.num_heads,
        in_chans=options.in_chans if wishes.in_chans is None else wishes.in_chans,
        encoder=wishes.encoder or options.encoder,
    )
    return bare, merged, options.key_map if key_map is None else key_map


def _plan(source: str, wishes: Wishes, key_map: KeyMapLike) -> Plan:
    contents = read_source(source)
    detected = detect(contents, wishes, ASKED if key_map is None else (own_family(key_map),))
    try:
        converted = detected.family.convert(detected.view, wishes)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Shapes and config entries of a damaged file can fail anywhere; all mean the same to the user.
        raise CheckpointError(
            f"{contents.source}: its tensors or its config.json do not fit the family '{detected.family.name}' "
            f"({type(error).__name__}: {one_line(error, 100)}); take the files from their source again"
        ) from error
    converted = _with_own_facts(converted, contents)
    if wishes.in_chans is not None:
        converted = adapt_channels(converted, wishes.in_chans)
    name = converted.family or detected.family.name
    licence = converted.licence or family_licence(name)
    return Plan(contents, detected.view, name, converted, licence, detected.encoders)


def _with_own_facts(converted: Converted, contents: Contents) -> Converted:
    """What an export of ours says about the encoder in any format: where it comes from, and how images go in."""
    own = (contents.config or {}).get(OWN_FACTS)
    if not isinstance(own, Mapping):
        return converted
    facts = {name: own[name] for name in ("family", "licence", "position_rule") if isinstance(own.get(name), str)}
    facts |= {name: tuple(own[name]) for name in ("mean", "std") if isinstance(own.get(name), list)}
    if own.get("encoder_pooling") in ("cls", "mean"):
        facts["pooling"] = own["encoder_pooling"]
    return replace(converted, **facts)


def _wrap(plan: Plan, model: Any, *, source: str, coverage: float) -> Backbone:
    converted = plan.converted
    return Backbone.wrap(
        model,
        family=plan.family,
        mean=_per_channel(converted, converted.mean),
        std=_per_channel(converted, converted.std),
        licence=plan.licence,
        coverage=coverage,
        source=source,
        position_rule=converted.position_rule,
        pooling=converted.pooling,
    )


def _notes(plan: Plan, position_rule: str, unplaced: list[str]) -> tuple[str, ...]:
    converted = plan.converted
    notes = list(converted.notes)
    if len(plan.encoders) > 1:
        others = ", ".join(label for label in plan.encoders if label != plan.view.label)
        notes.append(f"this is the encoder '{plan.view.label}'; the file also holds {others}: choose by --encoder")
    if converted.num_heads == 0:
        notes.append("the file does not tell the number of attention heads; pass num_heads= (--num-heads) to load it")
    if unplaced:
        notes.append(f"{len(unplaced)} tensors have no place in the encoder: {some(unplaced)}")
    notes.append(f"positions at other image sizes: {RULES[position_rule]}")
    if converted.licence is None and plan.licence != UNKNOWN_LICENCE:
        notes.append("licence: that of the family's published weights; weights trained by others carry their own")
    return tuple(notes)


def _complain(source: str, total: int, missing: list[str], unplaced: list[str], strict: bool) -> None:
    """Refuse a file that does not fit (strict), or warn what stays random and what is ignored."""
    problems = []
    if missing:
        problems.append(f"gives {total - len(missing)} of the encoder's {total} tensors, missing: {some(missing)}")
    if unplaced:
        problems.append(f"holds {len(unplaced)} tensors that the encoder has no place for: {some(unplaced)}")
    text = f"{source}: {' and '.join(problems)}"
    if strict:
        raise CheckpointError(f"{text}; give the complete file (strict=False would leave gaps random)")
    consequence = "; the missing ones stay RANDOM" if missing else "; they are ignored"
    warnings.warn(text + consequence, PartialCheckpointWarning, stacklevel=3)


def _check_numbers(tensors: dict[str, Tensor], model: Any, source: str) -> None:
    """Weights are real, finite numbers; CheckpointError names the first that is not."""
    expected = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if expected.get(name) and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{source}: {name} holds {kind} numbers instead of floats; save the weights as floats"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values; the file is unusable, take an earlier one"
            )


def _per_channel(converted: Converted, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Mean or std of the family where it fits the file's channels; None = default."""
    channels = converted.tensors[converted.projection].shape[1] if converted.projection in converted.tensors else 3
    return values if values is not None and len(values) == channels else None


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
