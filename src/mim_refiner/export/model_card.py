"""The README.md of an exported encoder: what it is, where it comes from, what it scored, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mim_refiner.export.parity import Parity
from mim_refiner.export.usage import LIBRARIES, usage
from mim_refiner.files import dotted
from mim_refiner.types import BackboneInfo

_METRIC_NAMES = {
    "knn_top1": "k-NN top-1",
    "linear_top1": "linear probe top-1",
    "cluster_accuracy": "clustering accuracy",
    "nmi": "normalised mutual information",
    "rank": "effective rank (RankMe)",
    "rank_centred": "effective rank, centred",
}
_SHARES = {"knn_top1", "linear_top1", "cluster_accuracy", "nmi"}


def model_card(info: BackboneInfo, card: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Markdown text.

    ``card`` keys, all optional: title, base (name of the starting weights), data, recipe (text or mapping), command,
    before and after ({metric: value}, shares on 0-1), notes (text). ``facts`` is the "mim_refiner" part of
    config.json: its format chooses the usage snippet; block, pooling and norm become the recommended features.
    """
    usual = f"{info.architecture}: {'refined ' if card.get('after') else ''}{info.family} encoder"
    parts = [
        _front_matter(info, card, facts),
        f"# {card.get('title') or usual}",
        _facts_table(info, card, facts),
        _figures(card),
        _recipe(card),
        usage(info, facts),
        str(card["notes"]) if card.get("notes") else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _front_matter(info: BackboneInfo, card: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    known = info.licence != "unknown" and re.fullmatch(r"[\w.-]+", info.licence)
    licence = info.licence.lower() if known else "other"  # the hub takes identifiers only
    library = LIBRARIES[facts.get("format", "timm")]
    base = re.fullmatch(r"(?:hf[-_]hub:)?([\w.-]+/[\w.-]+)", str(card.get("base") or ""))
    lines = [
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        f"license: {licence}",
        *([f"base_model: {base[1]}"] if base and str(card["base"]).startswith("hf") else []),
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(("image-feature-extraction", library, "mim-refiner"))),
    ]
    return "\n".join(["---", *lines, "---"])


def _facts_table(info: BackboneInfo, card: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    rows = {
        "Architecture": f"{info.architecture}, {info.depth} blocks, width {info.embed_dim}, {info.num_heads} heads",
        "Input": _input(info, facts),
        "Normalisation": f"mean {_numbers(info.mean)}, std {_numbers(info.std)} on the 0-1 scale",
        "Base weights": card.get("base") or facts.get("base") or "not recorded",
        "Family": info.family,
        "Licence of the weights": _licence(info),
        "Training data": card.get("data") or "not recorded",
        "Recommended features": _recommended(facts),
        "Verified": Parity(**facts["parity"]).sentence() if facts.get("parity") else "",
        "Written by": f"mim-refiner {facts.get('version', '')}".strip(),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _input(info: BackboneInfo, facts: Mapping[str, Any]) -> str:
    (height, width), (rows, columns) = info.image_size, info.patch_size
    sizes = {
        "onnx": f", batch {facts.get('batch', 'dynamic')}",
        "hf": "; other sizes with interpolate_pos_encoding=True, where transformers resizes positions by its own rule",
    }
    other = sizes.get(facts.get("format", "timm"), f" or any multiple of the patch ({rows}x{columns})")
    return f"{info.in_chans} channels, {height}x{width} px{other}"


def _licence(info: BackboneInfo) -> str:
    if info.licence == "unknown":
        return "not recorded; a refined encoder stays under the licence of its base weights, so check there"
    note = "a refined encoder stays under the licence of its base weights"
    if "-NC" in info.licence.upper():
        note += "; no commercial use"
    return f"{info.licence} ({note})"


def _recommended(facts: Mapping[str, Any]) -> str:
    if "block" not in facts and "pooling" not in facts:
        return ""
    norm = "with" if facts.get("norm") else "without"
    return f"block {facts.get('block', -1)}, pooling {facts.get('pooling', 'cls')}, {norm} the final norm"


def _figures(card: Mapping[str, Any]) -> str:
    before, after = card.get("before") or {}, card.get("after") or {}
    names = [name for name in {**before, **after} if isinstance({**before, **after}[name], int | float)]
    if not names:
        return ""
    lines = [f"| {_METRIC_NAMES.get(n, n)} | {_value(n, before.get(n))} | {_value(n, after.get(n))} |" for n in names]
    return "\n".join(["## Measured", "", "| metric | before | after |", "|---|---|---|", *lines])


def _value(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4g}"


def _recipe(card: Mapping[str, Any]) -> str:
    recipe, command = card.get("recipe"), card.get("command")
    parts = []
    if command:
        parts.append(f"```bash\n{command}\n```")
    if isinstance(recipe, Mapping):
        rows = [f"| {key} | {_cell(value)} |" for key, value in dotted(recipe).items() if value is not None]
        parts.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    elif recipe:
        parts.append(str(recipe))
    return "\n\n".join(["## How it was made", *parts]) if parts else ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _cell(value: Any) -> str:
    """Text that cannot break a table row."""
    return " ".join(str(value).split()).replace("|", "\\|")
