"""Sections of a file made plain: LoRA adapters merged, averages without names named; quantised weights are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.hf import VIT_KEYS
from mim_refiner.checkpoints.store import Contents
from mim_refiner.core.identity import tensors_sha256
from mim_refiner.errors import CheckpointError
from mim_refiner.files import errors_as
from mim_refiner.reporting import number_of

_START = "base_model.model."  # PEFT's wrapper
SAVED_HEAD = "modules_to_save"  # section of a classifier that was trained with an adapter
_LIST = "shadow_params"  # running averages that torch_ema and diffusers save as a list of tensors without names
_NO_PARAMETERS = ("running_mean", "running_var")  # buffers of floats
_FIXED = ("pos_embed",)  # tables that some encoders do not train
_PART = re.compile(r"(.+)\.lora_([AB])(?:\.(\w+))?\.weight")  # with the adapter's name, in files of one model
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that also alter the base model
_QUANTISED = (  # endings of names beside weights that are no floats
    ((".SCB", ".weight_format"), "8-bit weights of bitsandbytes"),
    ((".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"), "4-bit weights of bitsandbytes"),
    ((".qweight", ".qzeros", ".g_idx"), "weights of GPTQ or AWQ"),
    ((".weight_scale", ".weight_scale_inv", "_packed_params", "._weight_qdata"), "8-bit weights with scales"),
)


def plain_weights(contents: Contents) -> Contents:
    """``contents`` with LoRA layers merged, PEFT's names undone, averages named; refuses quantised weights."""
    _refuse_quantised(contents)
    sections = {path: _merged(contents, names) for path, names in contents.sections.items()}
    models = [held for path, held in sections.items() if not (path.startswith("opt") or all(map(str.isdecimal, held)))]
    for path, held in sections.items():
        if _is_list(path, held):
            sections[path] = next((placed for model in models if (placed := _placed(model, held))), held)
    return replace(contents, sections=sections)


def refuse_lists(contents: Contents) -> None:
    """CheckpointError for a list that fits no model: what it averages would be passed over in silence."""
    for path, held in contents.sections.items():
        if _is_list(path, held):
            raise CheckpointError(
                f"{contents.source}: {path} is a running average without names (torch_ema) whose list of "
                f"{number_of(len(held), 'tensors')} does not fit a model's in order; copy it into the model "
                "(copy_to) and save that, or pass encoder=model (--encoder) for the weights that are not averaged"
            )


def _is_list(path: str, held: Mapping[str, Tensor]) -> bool:
    return path.rpartition(".")[2] == _LIST and all(name.isdecimal() for name in held)


def _placed(model: dict[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """``model`` with its parameters' values from ``average``; fixed tables count only where the list has them."""
    names = [n for n, tensor in model.items() if tensor.is_floating_point() and not n.endswith(_NO_PARAMETERS)]
    values = list(average.values())
    for trained in (names, [name for name in names if not name.endswith(_FIXED)]):
        if [model[name].shape for name in trained] == [value.shape for value in values]:
            return model | dict(zip(trained, values, strict=True))
    return None


def with_adapter(base: Contents, adapter: Contents) -> Contents:
    """``base`` with the adapter of a PEFT folder merged; ``adapter.config`` is its adapter_config.json."""
    config = adapter.config or {}
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise _cannot(adapter.source, f"is an adapter of kind {kind}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise _cannot(adapter.source, f"was begun by init_lora_weights={start[:40]}, which changes the base model too")
    changed = next((name for name in ("layer_replication", "use_qalora") if config.get(name)), None)
    if changed:
        raise _cannot(adapter.source, f"is an adapter with {changed}, which changes what the base model computes")
    section = max(base.sections, key=lambda path: len(base.sections[path]))
    weights = dict(base.sections[section])
    given = adapter.sections.get("", {}).items()
    heads = {name: tensor for name, tensor in given if _is_head(name.removeprefix(_START), weights)}
    encoder = {name.removeprefix(_START): tensor for name, tensor in given if name not in heads}
    for name, tensor in encoder.items():
        if _PART.fullmatch(name) is None:  # a part that was trained whole
            weights[_target(weights, name.replace(".modules_to_save", ""), adapter.source)] = tensor
    _add(weights, encoder, config, f"{adapter.source}/adapter_config.json", base.source)
    saved = {SAVED_HEAD: heads} if heads else {}
    return replace(base, source=adapter.source, sections={**base.sections, section: weights, **saved})


def _is_head(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether the tensor of an adapter is of a classifier that the base model has not."""
    parts = name.split(".")
    known = any(known.endswith(f"{parts[0]}.{parts[-1]}") for known in weights)
    return parts[0] in {"head", "heads", "fc", "classifier", "score"} and not known


def _refuse_quantised(contents: Contents) -> None:
    for names in contents.sections.values():
        marks = ((name, kind) for endings, kind in _QUANTISED for name in names if name.endswith(endings))
        weights = {name: tensor for name, tensor in names.items() if name.endswith(".weight")}
        floats = all(t.is_floating_point() and t.element_size() > 1 for t in weights.values())
        if (found := next(marks, None)) and not (floats and any(name.endswith("qkv.weight") for name in weights)):
            raise CheckpointError(
                f"{contents.source}: holds {found[1]} ({found[0]}), which are not exact; load the model in the tool "
                "that wrote it, dequantise it there and save it in float"
            )


def _merged(contents: Contents, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One section with its LoRA layers merged; without any it stays as it is."""
    if not any("lora_" in name for name in names):
        return dict(names)
    if any("lora_magnitude" in name for name in names):
        raise _cannot(contents.source, "holds DoRA layers")
    if contents.fact("use_qalora"):
        raise _cannot(contents.source, "holds LoRA layers with use_qalora")
    names = {name.replace(_START, "", 1): tensor for name, tensor in names.items()}
    if not any(map(_PART.fullmatch, names)) or not any(".base_layer." in name for name in names):
        base = contents.fact("base_model_name_or_path") or "its base model"
        raise _cannot(contents.source, f"holds LoRA layers without the weights of {base} in PEFT's layout")
    plain = {
        re.sub(r"\.modules_to_save\.\w+\.", ".", name.replace(".base_layer.", ".")): tensor
        for name, tensor in names.items()
        if "lora_" not in name and ".original_module." not in name
    }
    if lone := next((layer for layer in _pairs(names, contents.source) if f"{layer}.weight" not in plain), None):
        raise _cannot(contents.source, f"adapts {lone}.weight, which its base model has not")
    # PEFT's options among the values beside one file's weights, as an adapter_config.json has them; ranks are told
    paths = contents.facts.items()
    patterns = {p.partition("alpha_pattern.")[2]: value for p, value in paths if ".alpha_pattern." in f".{p}"}
    said = {name: contents.fact(name) for name in ("lora_alpha", "use_rslora")}
    _add(plain, names, said | {"alpha_pattern": patterns, "r": None}, contents.source, contents.source)
    return plain


def _pairs(names: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B) of its LoRA; CheckpointError for several adapters of a layer or half of one."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in names.items():
        if match := _PART.fullmatch(name):
            held = parts.setdefault(match[1], {})
            if match[2] in held:
                raise _cannot(source, f"holds several LoRA adapters of {match[1]}")
            held[match[2]] = tensor
    if any(len(held) != 2 for held in parts.values()):
        raise _cannot(source, "holds half of a LoRA layer (lora_A without lora_B)")
    return {layer: (held["A"], held["B"]) for layer, held in parts.items()}


def _add(
    weights: dict[str, Tensor], lora: Mapping[str, Tensor], config: Mapping[str, Any], where: str, base: str
) -> None:
    """Add scale x B A of every layer to its weight, in float32: in half precision small changes would be lost.

    For messages, ``where`` names what says ``config``, and ``base`` what holds ``weights``.
    """
    source = where.removesuffix("/adapter_config.json")
    pairs = _pairs(lora, source)
    places = {layer: _target(weights, f"{layer}.weight", source) for layer in pairs}
    if "base_sha256" in config:  # of the adapted weights, as our own export writes it
        theirs = tensors_sha256({layer: weights[name].float() for layer, name in places.items()})
        if theirs != config["base_sha256"]:
            raise CheckpointError(
                f"{source}: is an adapter of other weights than {base} has (base_sha256 in its adapter_config.json); "
                "name the encoder that it was made of there"
            )
    for layer, (a, b) in pairs.items():
        if not bool(b.any()):
            continue
        weight, scale = weights[places[layer]], _scale(config, layer, a.shape[0], where)
        try:
            change = (b.float().flatten(1) @ a.float().flatten(1)).reshape(weight.shape)
        except RuntimeError as error:
            raise _cannot(source, f"has LoRA layers of shapes {list(a.shape)} and {list(b.shape)}") from error
        weights[places[layer]] = weight.float() + scale * change


def _scale(config: Mapping[str, Any], layer: str, rank: int, where: str) -> float:
    """alpha / rank of a layer; the first entry of alpha_pattern that the layer's name ends with says its alpha."""
    found = {"alpha_pattern": config.get("lora_alpha", 8), "rank_pattern": config.get("r", 8)}
    for entry, usual in found.items():
        pattern = config.get(entry) or {}
        if not isinstance(pattern, Mapping) or not all(isinstance(v, int | float) and v > 0 for v in pattern.values()):
            raise CheckpointError(f"{where}: {entry} must be an object of layers and numbers; correct it")
        found[entry] = next((v for key, v in pattern.items() if _speaks_of(key, layer, where)), usual)
    alpha, said = found.values()
    if alpha is None:
        raise _cannot(where, "holds LoRA layers whose scale (lora_alpha) it does not tell")
    if not isinstance(alpha, int | float) or not isinstance(said, int | None):
        raise CheckpointError(f"{where}: r and lora_alpha must be numbers; correct it")
    if said not in (rank, None):
        raise CheckpointError(f"{where}: r or rank_pattern says rank {said}, not {rank}, for {layer[:80]}; correct it")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _speaks_of(pattern: str, layer: str, where: str) -> bool:
    """Whether an entry of PEFT's patterns is about ``layer``: an expression for its name or the end of it."""
    if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:  # may never end
        raise CheckpointError(f"{where}: the pattern {ascii(pattern)[:80]} is too involved; name the layers in it")
    with errors_as(CheckpointError, f"{where}: {ascii(pattern)[:80]} is no pattern", "correct it"):
        return re.match(rf"(?:.*\.)?(?:{pattern})$", layer) is not None


def _target(weights: Mapping[str, Tensor], name: str, source: str) -> str:
    """The base's tensor of that name, whatever the model stands in ("vit.")."""
    found = [known for known in weights if known == name] or [
        known for known in weights if known.endswith(f".{name}") or name.endswith(f".{known}")
    ]
    if not found and (meant := _place(name)):
        found = [known for known in weights if _place(known) == meant]
    if len(found) != 1:
        raise _cannot(source, f"adapts {name}, which its base model has not")
    return found[0]


def _place(name: str) -> tuple[str, int] | None:
    """What a name of transformers 4 or 5 means, whatever the model stands in; None for a decoder's."""
    inner = re.search(r"(?:^|\.)((?:encoder\.layer|layers|embeddings|layernorm)\..+)", name)
    found = VIT_KEYS.target(inner[1]) if inner and "decoder" not in name else None
    return found and found[:2]


def _cannot(source: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {what}; merge it with the model in the tool that wrote it (PEFT: merge_and_unload()) and save that"
    )
