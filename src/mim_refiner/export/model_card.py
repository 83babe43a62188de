"""The README.md of an exported encoder: what it is, where it comes from, what it scored, how to load it.

Its text is templates/card.md.j2; here is what is filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from mim_refiner.files import dotted
from mim_refiner.reporting import metric_title, number_of
from mim_refiner.types import BackboneInfo

# The front matter's library_name: who loads the folder.
_LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "refiner": "mim-refiner"}
_SHARES = {"knn_top1", "linear_top1", "cluster_accuracy", "nmi"}


@dataclass(frozen=True)
class Parity:
    """Largest difference between the exported model and the encoder, over everything compared."""

    max_abs_difference: float
    largest_value: float  # largest absolute value compared
    tolerance: float  # allowed difference, times the largest value of the tensor where that is above 1
    images: int
    source: str
    compared: str

    def sentence(self) -> str:
        """One line for a model card."""
        return (
            f"largest difference to the encoder {self.max_abs_difference:.2g} (values up to {self.largest_value:.3g}, "
            f"tolerance {self.tolerance:.0e} of the largest value) over {self.compared} of "
            f"{number_of(self.images, 'images')}, {self.source}"
        )


def model_card(info: BackboneInfo, card: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Markdown text.

    ``card`` keys, all optional: title, base (name of the starting weights), weights (which of a run's these are), data,
    recipe (text or mapping), command, before and after ({metric: value}, shares on 0-1), notes (text). ``facts`` is the
    "mim_refiner" part of config.json: its format chooses the usage snippet; block, pooling and norm become the
    recommended features.
    """
    known = info.licence != "unknown" and re.fullmatch(r"[\w.-]+", info.licence)
    base, recipe = re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+)", str(card.get("base") or "")), card.get("recipe")
    environment = Environment(keep_trailing_newline=True)
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    text = (files("mim_refiner.export") / "templates" / "card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        info=info,
        card=card,
        facts=facts,
        library=_LIBRARIES[facts.get("format", "timm")],
        licence_tag=info.licence.lower() if known else "other",  # the hub takes identifiers only
        hub_base=base and base[1],
        rows=_rows(info, card, facts),
        figures=_figures(card),
        settings=dotted(recipe) if isinstance(recipe, Mapping) else None,
        block=int(facts.get("block", -1)),
        norm=bool(facts.get("norm", False)),
        pooling=facts.get("pooling") or ("cls" if info.has_cls else "mean"),
        batch=facts.get("batch", "dynamic"),
    )


def _rows(info: BackboneInfo, card: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (info.mean, info.std))
    licence = "a refined encoder stays under the licence of its base weights"
    licence += "; no commercial use" if "-NC" in info.licence.upper() else ""
    licence = f"{info.licence} ({licence})" if info.licence != "unknown" else f"not recorded; {licence}, so check there"
    norm = "with" if facts.get("norm") else "without"
    features = f"block {facts.get('block', -1)}, pooling {facts.get('pooling', 'cls')}, {norm} the final norm"
    return {
        "Architecture": f"{info.architecture}, {number_of(info.depth, 'blocks')}, width {info.embed_dim}, "
        f"{number_of(info.num_heads, 'heads')}",
        "Input": _input(info, facts),
        "Normalisation": f"mean {mean}, std {std} on the 0-1 scale",
        "Base weights": card.get("base") or facts.get("base") or "not recorded",
        "Exported weights": card.get("weights") or "",
        "Family": info.family,
        "Licence of the weights": licence,
        "Training data": card.get("data") or "not recorded",
        "Recommended features": features if "block" in facts or "pooling" in facts else "",
        "Verified": Parity(**facts["parity"]).sentence() if facts.get("parity") else "",
        "Written by": f"mim-refiner {facts.get('version', '')}".strip(),
    }


def _input(info: BackboneInfo, facts: Mapping[str, Any]) -> str:
    (height, width), (rows, columns) = info.image_size, info.patch_size
    sizes = {
        "onnx": f", batch {facts.get('batch', 'dynamic')}",
        "hf": "; other sizes with interpolate_pos_encoding=True, where transformers resizes positions by its own rule",
    }
    other = sizes.get(facts.get("format", "timm"), f" or any multiple of the patch ({rows}x{columns})")
    return f"{number_of(info.in_chans, 'channels')}, {height}x{width} px{other}"


def _figures(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, before, after) of everything measured."""
    before, after = card.get("before") or {}, card.get("after") or {}
    names = [name for name, value in {**before, **after}.items() if isinstance(value, int | float)]
    return [(metric_title(n), _value(n, before.get(n)), _value(n, after.get(n))) for n in names]


def _value(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4g}"
