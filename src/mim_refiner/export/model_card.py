"""The README.md of an exported encoder: what it is, where it comes from, what it scored, how to load it.

Its text is templates/card.md.j2; here is what is filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from mim_refiner.files import dotted
from mim_refiner.reporting import metric_title, number_of
from mim_refiner.types import BackboneInfo

# The front matter's library_name: who loads the folder.
_LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "refiner": "mim-refiner"}
_SHARES = {"knn_top1", "linear_top1", "cluster_accuracy", "nmi"}


def model_card(info: BackboneInfo, card: Mapping[str, Any], facts: Mapping[str, Any], verified: str) -> str:
    """Markdown text.

    ``card`` keys, all optional: title, base (name of the starting weights), weights (which of a run's these are), data,
    recipe (text or mapping), command, before and after ({metric: value}, shares on 0-1), notes (text). ``facts`` is the
    "mim_refiner" part of config.json: its format chooses the usage snippet; block, pooling and norm become the
    recommended features. ``verified``: how far the exported model is from the encoder.
    """
    known = info.licence != "unknown" and re.fullmatch(r"[\w.-]+", info.licence)
    base, recipe = re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+)", str(card.get("base") or "")), card.get("recipe")
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (info.mean, info.std))
    measured = {**(card.get("before") or {}), **(card.get("after") or {})}
    environment = Environment(keep_trailing_newline=True)
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    text = (files("mim_refiner.export") / "templates" / "card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        info=info,
        card=card,
        facts=facts,
        library=_LIBRARIES[facts["format"]],
        licence_tag=info.licence.lower() if known else "other",  # the hub takes identifiers only
        hub_base=base and base[1],
        number_of=number_of,
        mean=mean,
        std=std,
        verified=verified,
        measures=[name for name, value in measured.items() if isinstance(value, int | float)],
        metric_title=metric_title,
        shares=_SHARES,
        settings=dotted(recipe) if isinstance(recipe, Mapping) else None,
        block=int(facts.get("block", -1)),
        norm=bool(facts.get("norm", False)),
        pooling=facts.get("pooling") or ("cls" if info.has_cls else "mean"),
        batch=facts.get("batch", "dynamic"),
    )
