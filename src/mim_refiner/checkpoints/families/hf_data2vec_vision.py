"""Hugging Face transformers: Data2VecVision, the first data2vec, in BEiT's architecture and names."""

from __future__ import annotations

from dataclasses import replace

from mim_refiner.checkpoints.families import hf, hf_beit
from mim_refiner.checkpoints.families.base import View


def matches(view: View) -> bool:
    """BEiT's biases and a config.json that says data2vec-vision, or the prefix of its task models."""
    named = view.model_type == "data2vec-vision" or (
        view.contents.config is None and "data2vec_vision" in view.prefix.split(".")
    )
    return named and hf.has_query_bias_only(view)


FAMILY = replace(hf_beit.FAMILY, name="hf_data2vec_vision", matches=matches)
