"""Tell what a checkpoint is from its keys and shapes; its file name says nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mim_refiner.checkpoints.adapters import refuse_lists
from mim_refiner.checkpoints.families import FAMILIES, Family, View, Wishes
from mim_refiner.checkpoints.families.base import GUESS
from mim_refiner.checkpoints.families.plain_vit import VIT_NAMES
from mim_refiner.checkpoints.families.timm_format import FAMILY as TIMM
from mim_refiner.checkpoints.refused import looks_like, refuse_by_name
from mim_refiner.checkpoints.store import Contents, some, strip_wrappers, words
from mim_refiner.errors import CheckpointError, InputError, did_you_mean

# Parts of names of running averages of an encoder, best first; the others come in the order of the file.
_AVERAGES = (
    "teacher", "target", "momentum", "ema", "averaged", "average", "avg", "polyak", "swa", "shadow", "k", "key",
)  # fmt: skip
_NO_AVERAGE = {"gram", "student", "online"}  # a Gram teacher is an old state, only there to regularise
# Parts of paths and prefixes that do not tell encoders apart.
_UNTELLING = {"", "model", "state_dict", "backbone", "net", "network", "vit", "beit", "trunk", "visual"}


@dataclass(frozen=True)
class Detected:
    """A file's family, the encoder chosen in it, and the labels of all its encoders."""

    family: Family
    view: View
    encoders: tuple[str, ...]
    note: str = ""  # on the choice, where names do not tell it or tell it wrongly


def detect(contents: Contents, wishes: Wishes, own: Family | None = None) -> Detected:
    """The first family that claims an encoder of the file, or the caller's ``own``; and the encoder to take.

    That is the one ``wishes.encoder`` names, else the running average, whatever its tool calls it, unless the family
    prefers another. Raises CheckpointError for a file that no family claims, with a guess at what it is, and InputError
    for an encoder that is not there.
    """
    if own is None:
        refuse_by_name(contents)
    if wishes.encoder is None:
        refuse_lists(contents)
    for family in FAMILIES if own is None else (own,):
        views = list(_views(contents, family))
        found = [view for view in views if family.matches(view)]
        if found:
            found = _labelled(
                [view for view in views if any(view is one for one in found) or _is_alike(view, found[0])]
            )
            view, note = _choose(found, family, wishes)
            return Detected(family, view, tuple(view.label for view in found), note)
    raise _unknown(contents)


def _views(contents: Contents, family: Family) -> Iterator[View]:
    """Everything in the file that may be an encoder: wherever the anchor is, what stands before it is the prefix."""
    anchor = family.anchor
    for section, tensors in contents.sections.items():
        stripped = {name: strip_wrappers(name) for name in tensors}
        if len(set(stripped.values())) < len(stripped):
            twice = Counter(stripped.values()).most_common(1)[0][0]
            raise CheckpointError(
                f"{contents.source}: two tensors are named {twice} once wrappers are left out; save the encoder alone"
            )
        prefixes = [
            name.removesuffix(anchor) for name in stripped.values() if name == anchor or name.endswith("." + anchor)
        ]
        told = family.any_names or (family.reads_config and contents.config is not None)
        if told and not prefixes and not section.startswith("opt"):
            prefixes = [""]
        for prefix in prefixes:
            inside = {name: short for name, short in stripped.items() if short.startswith(prefix)}
            yield View(
                contents=contents,
                section=section,
                prefix=prefix,
                label=_label(section, prefix),
                tensors={short.removeprefix(prefix): tensors[name] for name, short in inside.items()},
                names={short.removeprefix(prefix): name for name, short in inside.items()},
                outside={short: name for name, short in stripped.items() if name not in inside},
            )


def _label(section: str, prefix: str) -> str:
    """What an encoder is called: the telling part of its place, nearest first; "model" where nothing tells."""
    for part in reversed([*section.split("."), *prefix.split(".")]):
        if "ema" in words(part):
            return "ema"
        if part not in _UNTELLING and not part.isdigit():
            return part
    return "model"


def _labelled(views: list[View]) -> list[View]:
    """Encoders of the same label are called by their full place instead."""
    counts = Counter(view.label for view in views)
    return [
        replace(view, label=f"{view.section}:{view.prefix.rstrip('.')}".strip(":")) if counts[view.label] > 1 else view
        for view in views
    ]


def _choose(views: list[View], family: Family, wishes: Wishes) -> tuple[View, str]:
    by_label = {view.label: view for view in views}
    if wishes.encoder is not None:
        close = [label for label in by_label if wishes.encoder.lower() in words(label)]
        if wishes.encoder not in by_label and len(close) == 1:
            return by_label[close[0]], ""
        if wishes.encoder not in by_label:
            raise InputError(
                f"{views[0].where}: has no encoder '{wishes.encoder}'{did_you_mean(wishes.encoder, by_label)}; "
                f"it holds {', '.join(by_label)}; pass one of them as encoder= (--encoder)"
            )
        return by_label[wishes.encoder], ""
    preferred = [label for label in family.default_encoder if label in by_label]
    return (by_label[preferred[0]], "") if preferred else _best_named(views)


def _best_named(views: list[View]) -> tuple[View, str]:
    """The running average, else the first encoder; and what to remark.

    What has other shapes than every model of the file is no average of one. mmengine's EMAHook swaps the two on saving.
    """
    if swapped := [view for view in views if _is_swapped(view)]:
        views = [view for view in views if not any(view is one for one in swapped)] or views
        note = "mmengine saves the running average as state_dict, and the weights in training as ema_state_dict"
        return min(views, key=_rank), note
    best, models = min(views, key=_rank), [view for view in views if _rank(view) >= len(_AVERAGES)]
    if models and _rank(best) < len(_AVERAGES) and not any(_shapes(best) == _shapes(view) for view in models):
        chosen = min(models, key=_rank)
        return chosen, (
            f"{GUESS}'{chosen.label}' is the encoder, since '{best.label}' has other shapes and is no average of it; "
            "pass encoder= (--encoder) if not"
        )
    rivals = [view.label for view in views if view is not best and _rank(view) == _rank(best)]
    told = f"{GUESS}'{best.label}' of the file's encoders, since no name tells; it also holds {', '.join(rivals)}: "
    return best, f"{told}pass encoder= (--encoder)" if rivals else ""


def _is_swapped(view: View) -> bool:
    """Whether a view is of the weights that mmengine's EMAHook calls ema_state_dict."""
    contents = view.contents
    if view.section.split(".")[0] != "ema_state_dict" or "state_dict" not in contents.sections:
        return False
    return "steps" in contents.section("ema_state_dict") or any(
        path.startswith("message_hub.") or path == "meta.mmengine_version" for path in contents.facts
    )


def _shapes(view: View) -> dict[str, tuple[int, ...]]:
    """Shapes of the blocks and of the patch projection, which an average shares with its model."""
    parts = ("block", "layer", "patch_embed")
    return {name: tuple(t.shape) for name, t in view.tensors.items() if any(part in name for part in parts)}


def _is_alike(view: View, known: View) -> bool:
    """Whether a view has the kind of blocks of a known encoder: a second state under a name that the family lacks."""
    parts = [{n.split(".", 2)[-1] for n in one.tensors if n.startswith("blocks.")} for one in (view, known)]
    return bool(parts[1]) and parts[0] == parts[1]


def _rank(view: View) -> int:
    """Place of a view's name among those of running averages (MoCo's is encoder_k); after them all for another name."""
    found = words(f"{view.section}.{view.prefix}")
    if _NO_AVERAGE & found:
        return len(_AVERAGES) + ("gram" in found)
    return next((rank for rank, name in enumerate(_AVERAGES) if name in found), len(_AVERAGES))


def _strange_parts(contents: Contents) -> list[str]:
    """Names in the file of what stands in the blocks of a ViT that would be plain without it."""
    for view in _views(contents, TIMM):
        inside = {name: held for name, held in view.names.items() if name.startswith("blocks.")}
        if any(name.endswith(".norm1.weight") for name in inside) and any(".attn." in name for name in inside):
            return [held for name, held in inside.items() if not VIT_NAMES.knows(name)]
    return []


def _unknown(contents: Contents) -> CheckpointError:
    names = [f"{path}.{strip_wrappers(name)}".lstrip(".") for path, held in contents.sections.items() for name in held]
    if all(name.startswith(("optim", "fp32_flat_groups", "single_partition")) for name in names):
        return CheckpointError(
            f"{contents.source}: holds an optimiser's state and no model; give the file of the weights"
        )
    kind = None if contents.config is None else contents.config.get("model_type")
    guess = f"a Hugging Face model of type '{kind}'" if kind else None
    guess = guess or looks_like(names)
    if guess is None and (strange := _strange_parts(contents)):
        return CheckpointError(
            f"{contents.source}: {len(strange)} tensors in its blocks are none of a plain ViT's: {some(strange)}; "
            "merge them into the weights in the tool that added them (LoRA, pruning, parametrizations); or, if it "
            "works without them, name them under drop: in a key map (--key-map); give another architecture of timm as "
            "a folder with its config.json"
        )
    if guess is None and any("attn.qkv.weight" in name for name in names):
        guess = "a transformer without patch_embed.proj.weight"
    seen = f"it looks like {guess}" if guess else f"its tensors are named {', '.join(names[:3])}"
    known = ", ".join(family.name for family in FAMILIES)
    return CheckpointError(
        f"{contents.source}: is not a checkpoint of a known family ({known}); {seen}; "
        "give an encoder's weights under timm's names, a timm folder, or a key map (see the README)"
    )
