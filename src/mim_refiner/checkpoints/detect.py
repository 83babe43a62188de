"""Tell what a checkpoint is from its keys and shapes; its file name says nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from mim_refiner.checkpoints.adapters import refuse_lists
from mim_refiner.checkpoints.families import FAMILIES, Family, View, Wishes
from mim_refiner.checkpoints.families.base import GUESS, PROJECTION
from mim_refiner.checkpoints.families.described import TIMM
from mim_refiner.checkpoints.families.plain_vit import VIT_NAMES
from mim_refiner.checkpoints.store import Contents, some, strip_wrappers, words
from mim_refiner.errors import CheckpointError, InputError, did_you_mean
from mim_refiner.reporting import number_of

# Parts of names of running averages of an encoder, best first; the others come in the order of the file.
_AVERAGES = (
    "teacher", "target", "momentum", "ema", "averaged", "average", "avg", "polyak", "swa", "shadow", "k", "key",
)  # fmt: skip
_NO_AVERAGE = {"gram", "student", "online"}  # a Gram teacher is an old state, only there to regularise
# Parts of paths and prefixes that do not tell encoders apart.
_UNTELLING = {"", "model", "state_dict", "backbone", "net", "network", "vit", "beit", "trunk", "visual"}


def detect(contents: Contents, wishes: Wishes, own: Family | None = None) -> tuple[Family, View]:
    """The first family that claims an encoder of the file, or the caller's ``own``; and the encoder to take.

    That is the one ``wishes.encoder`` names, else the running average, whatever its tool calls it, unless the family
    prefers another. Raises CheckpointError for a file that no family claims, with a guess at what it is, and InputError
    for an encoder that is not there.
    """
    for section, held in contents.sections.items() if own is None else ():
        named = {} if section.startswith("opt") else {strip_wrappers(name): value for name, value in held.items()}
        if what := next((what for matches, what in _REFUSED if matches(named)), None):
            raise CheckpointError(f"{contents.source}: is {what}")
    if wishes.encoder is None:
        refuse_lists(contents)
    for family in FAMILIES if own is None else (own,):
        views = list(_views(contents, family))
        found = [view for view in views if family.matches(view)]
        if found:
            found = [view for view in views if view in found or _is_alike(view, found[0])]
            counts = Counter(view.label for view in found)
            found = [  # those of one label are called by their full place
                replace(view, label=f"{view.section}:{view.prefix.rstrip('.')}".strip(":"))
                if counts[view.label] > 1
                else view
                for view in found
            ]
            view, note = _choose(found, family, wishes)
            return family, replace(view, encoders=tuple(view.label for view in found), note=note)
    raise _unknown(contents)


def _views(contents: Contents, family: Family) -> Iterator[View]:
    """Everything in the file that may be an encoder: wherever the anchor is, what stands before it is the prefix."""
    anchor = family.anchor
    for section, tensors in contents.sections.items():
        stripped = {name: strip_wrappers(name) for name in tensors}
        if len(set(stripped.values())) < len(stripped):
            twice = Counter(stripped.values()).most_common(1)[0][0]
            raise CheckpointError(f"{contents.source}: two tensors mean {twice}; save the encoder alone")
        prefixes = [name.removesuffix(anchor) for name in stripped.values() if f".{name}".endswith(f".{anchor}")]
        told = family.any_names and (family is not TIMM or contents.config is not None)
        if told and not prefixes and not section.startswith("opt"):
            prefixes = [""]
        for prefix in prefixes:
            inside = {name: short for name, short in stripped.items() if short.startswith(prefix)}
            parent = prefix.rstrip(".").rpartition(".")[0]
            yield View(
                contents=contents,
                section=section,
                prefix=prefix,
                label=_label(section, prefix),
                tensors={short.removeprefix(prefix): tensors[name] for name, short in inside.items()},
                names={short.removeprefix(prefix): name for name, short in inside.items()},
                beside={s.removeprefix(f"{parent}."): name for name, s in stripped.items() if name not in inside},
            )


def _label(section: str, prefix: str) -> str:
    """What an encoder is called: the telling part of its place, nearest first; "model" where nothing tells."""
    for part in reversed([*section.split("."), *prefix.split(".")]):
        if "ema" in words(part):
            return "ema"
        if part not in _UNTELLING and not part.isdigit():
            return part
    return "model"


def _choose(views: list[View], family: Family, wishes: Wishes) -> tuple[View, str]:
    by_label, wanted = {view.label: view for view in views}, wishes.encoder
    if wanted is None:
        preferred = [by_label[label] for label in family.default_encoder if label in by_label]
        return (preferred[0], "") if preferred else _best_named(views)
    close = [label for label in by_label if wanted.lower() in words(label)]
    wanted = close[0] if wanted not in by_label and len(close) == 1 else wanted
    if wanted not in by_label:
        raise InputError(
            f"{views[0].where}: has no encoder '{wanted}'{did_you_mean(wanted, by_label)}; "
            f"it holds {', '.join(by_label)}; pass one of them as encoder= (--encoder)"
        )
    return by_label[wanted], ""


def _best_named(views: list[View]) -> tuple[View, str]:
    """The running average, else the first encoder, and what to remark; mmengine's EMAHook swaps the two on saving."""
    if swapped := [view for view in views if _is_swapped(view)]:
        views = [view for view in views if view not in swapped] or views
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
    return "steps" in contents.sections.get("ema_state_dict", {}) or any(
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


def _unknown(contents: Contents) -> CheckpointError:
    names = [f"{path}.{strip_wrappers(name)}".lstrip(".") for path, held in contents.sections.items() for name in held]
    if all(name.startswith(("optim", "fp32_flat_groups", "single_partition")) for name in names):
        return CheckpointError(
            f"{contents.source}: holds an optimiser's state and no model; give the file of the weights"
        )
    kind = None if contents.config is None else contents.config.get("model_type")
    guess = f"a Hugging Face model of type '{kind}'" if kind else None
    guess = guess or next((what for part, what in _KNOWN_OTHERS if any(part in name for name in names)), None)
    for view in _views(contents, TIMM) if guess is None else ():
        inside = {name: held for name, held in view.names.items() if name.startswith("blocks.")}
        strange = [held for name, held in inside.items() if not VIT_NAMES.knows(name)]
        like_vit = any(name.endswith(".norm1.weight") for name in inside) and any(".attn." in name for name in inside)
        if strange and like_vit:
            return CheckpointError(
                f"{contents.source}: {number_of(len(strange), 'tensors')} in its blocks, none of a plain ViT's: "
                f"{some(strange)}; "
                "merge them into the weights in the tool that added them (LoRA, pruning, parametrizations); or, if it "
                "works without them, name them under drop: in a key map (--key-map); give another architecture of timm "
                "as a folder with its config.json"
            )
    if guess is None and any("attn.qkv.weight" in name for name in names):
        guess = "a transformer without patch_embed.proj.weight"
    seen = f"it looks like {guess}" if guess else f"its tensors are named {', '.join(names[:3])}"
    known = ", ".join(family.name for family in FAMILIES)
    return CheckpointError(
        f"{contents.source}: is not a checkpoint of a known family ({known}); {seen}; "
        "give an encoder's weights under timm's names, a timm folder, or a key map (see the README)"
    )


# --- files that are known and refused by name, each with the reason or the way to load it

Tensors = Mapping[str, Tensor]  # of a section, by name without wrappers


def _starts(*parts: str) -> Callable[[Tensors], bool]:
    """Whether a name starts so, or goes on so at a dot."""
    inside = tuple(f".{part}" for part in parts)
    return lambda held: any(name.startswith(parts) or any(part in name for part in inside) for name in held)


def _ending(held: Tensors, ending: str) -> Iterator[tuple[str, Tensor]]:
    """(what stands before it, tensor) of every name that ends so, at a dot."""
    for name, tensor in held.items():
        if f".{name}".endswith(f".{ending}"):
            yield name.removesuffix(ending), tensor


def _satmae_temporal(held: Tensors) -> bool:
    tables = ((start, table) for start, table in _ending(held, "pos_embed") if table.ndim == 3)
    return any(
        held[start + PROJECTION].ndim == 4 and 0 < table.shape[2] < held[f"{start}cls_token"].shape[-1]
        for start, table in tables
        if {f"{start}cls_token", start + PROJECTION} <= held.keys()
    )


def _video(held: Tensors) -> bool:
    return any(
        projection.ndim == 5
        and projection.shape[2] > 1
        and bool({f"{start}cls_token", f"{start}pos_embed_temporal"} & held.keys())
        for start, projection in _ending(held, PROJECTION)
    )


_CONVERSION = "of transformers; load timm's conversion of it"
_REFUSED: tuple[tuple[Callable[[Tensors], bool], str], ...] = (
    (
        _starts("hiera.encoder.", "encoder.stages.0.layers.0.attn."),
        "a Hiera of transformers; load timm's conversion, for example hiera_tiny_224.mae",
    ),
    (_starts("swin.encoder.", "encoder.layers.0.blocks.0.attention.self."), f"a Swin Transformer {_CONVERSION}"),
    (_starts("swinv2.encoder."), f"a Swin Transformer V2 {_CONVERSION}"),
    (
        _starts("embeddings.distillation_token"),
        "a DeiT of transformers (load timm's deit_base_distilled_patch16_224) or an Audio Spectrogram Transformer "
        "(its two class tokens are not read)",
    ),
    (
        lambda held: any(f"{at}patch_embed.0.proj.weight" in held for at, _ in _ending(held, "channel_embed")),
        "a SatMAE with groups of channels: every place of the image has a token for each group, as in no plain "
        "ViT; use SatMAE's RGB encoder, or another encoder of many bands (SSL4EO-S12, Prithvi)",
    ),
    (
        _satmae_temporal,
        "a temporal SatMAE: it encodes three images and their dates together, and has no meaning for one image; use "
        "SatMAE's RGB encoder",
    ),
    (
        _video,
        "a video encoder whose class token and positions are those of many frames, so that one image is nothing it was "
        "trained for; use an encoder of images",
    ),
    (
        lambda held: any(t.ndim == 5 for _, t in _ending(held, "embeddings.patch_embeddings.projection.weight")),
        "a video encoder of transformers (VideoMAE or ViViT); load the VideoMAE file of its authors, where an image is "
        "read as one tubelet of equal frames, or an encoder of images",
    ),
    (
        lambda held: any(_ending(held, "rope_embed.periods")),
        "a DINOv3 in its authors' layout; load timm's conversion, for example vit_base_patch16_dinov3.lvd1689m",
    ),
    (
        lambda held: any(".mlp.experts." in name for name in held),
        "a ViTPose+ whose MLPs have a part for every data set; split it by the authors' tools/model_split.py first",
    ),
)
# Telling parts of names in files that no family claims; first match wins.
_KNOWN_OTHERS = (
    ("layer1.0.conv1.weight", "a ResNet"),
    ("encoder.stages.0.layers.0.pwconv1.", f"a ConvNeXt {_CONVERSION}"),
    ("embeddings.class_embedding", f"a CLIP {_CONVERSION}"),
    ("layer.0.attention.o_proj.", f"a DINOv3 {_CONVERSION}"),
    ("embeddings.cls_token_distill", f"a DeiT {_CONVERSION}"),
    ("convnextv2.", f"a ConvNeXt V2 {_CONVERSION}"),
    ("vision_model.encoder.layers.", f"a CLIP or SigLIP {_CONVERSION}"),
    ("stages.0.", "a hierarchical network (ConvNeXt or Swin)"),
    ("layers.0.blocks.", "a Swin Transformer"),
    ("w12.weight", "a ViT with SwiGLU (DINOv2 giant)"),
    ("relative_position_bias_table", "a BEiT with parts missing"),
    ("alibi", "another modality of data2vec 2.0"),
    ("embeddings.patch_embeddings", "another Hugging Face transformers model"),
    ("lora_A", "a LoRA adapter without its base model"),
    ("_flat_param", "flat parameters of FSDP; save the full state dict (FULL_STATE_DICT)"),
)
