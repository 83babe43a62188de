"""Augmentation sets by domain: what changes beside the recipe for photographs, and why.

``--set domain=NAME`` lays a set over the recipe's views, instead of that of a file's domain; what ``--set`` or the file
say of ``views.KEY`` besides overrules it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PHOTOGRAPHS = "photographs"


@dataclass(frozen=True)
class Domain:
    """Keys of ``views`` with their values, and the reason in one sentence."""

    reason: str
    views: Mapping[str, Any]


_NO_COLOUR = {"gray_prob": 0.0, "solarize_prob": (0.0, 0.0, 0.0)}
_LITTLE_BLUR = {"blur_prob": (0.5, 0.1, 0.2)}
_LARGE_CROPS = {"global_scale": (0.4, 1.0), "local_scale": (0.1, 0.4)}
_MASKS = {"mask_rows": 0.15, "mask_columns": 0.15}
DOMAINS: dict[str, Domain] = {
    PHOTOGRAPHS: Domain("the recipe's own views", {}),
    "medical": Domain(
        "brightness and contrast differ by device, colour and inversion carry meaning, and findings are small: no hue, "
        "no solarisation, larger crops, small turns",
        {**_NO_COLOUR, **_LITTLE_BLUR, **_LARGE_CROPS, "jitter": (0.3, 0.3, 0.0, 0.0), "rotate": 10.0, "noise": 0.02},
    ),
    "multispectral": Domain(
        "channels are bands, not colours, and a scene seen from above has no way up: gain and noise of each band, "
        "flips both ways, no hue",
        {**_NO_COLOUR, **_LITTLE_BLUR, "jitter": (0.2, 0.2, 0.0, 0.0), "gain": 0.1, "noise": 0.02, "vflip": 0.5},
    ),
    "spectrogram": Domain(
        "time has a direction and every frequency its place: crops along the longer axis only, no flips, masks of time "
        "and frequency, gain instead of colours",
        {**_NO_COLOUR, **_MASKS, "jitter_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0), "flip": 0.0, "gain": 0.2}
        | {"crop_axes": "longer", "global_scale": (0.5, 1.0), "local_scale": (0.15, 0.45)},
    ),
    "documents": Domain(
        "text cannot be mirrored and is read at one size: no flips, small turns, little blur, larger crops",
        {**_LARGE_CROPS, "jitter": (0.3, 0.3, 0.1, 0.02), "solarize_prob": (0.0, 0.0, 0.0), "flip": 0.0, "rotate": 3.0}
        | {"blur_prob": (0.3, 0.1, 0.1), "blur_sigma": (0.1, 1.0)},
    ),
    "microscopy": Domain(
        "a slide has no way up and stains vary: full turns, flips both ways, mild colours, no solarisation",
        {**_LITTLE_BLUR, "jitter": (0.3, 0.3, 0.2, 0.05), "gray_prob": 0.1, "vflip": 0.5, "rotate": 180.0}
        | {"solarize_prob": (0.0, 0.0, 0.0)},
    ),
}


def suggest_domain(channels: int, bits: int, aspect: float, background: float | None = None) -> str:
    """The set that fits images of so many channels and bits a value.

    aspect: longer by shorter side, the median. background: share of nearly white pixels, where it was looked at. What
    these cannot tell (microscopy, X-rays saved as RGB) is the user's to say.
    """
    if channels not in (1, 3):
        return "multispectral"
    if channels == 1 and aspect >= 2:
        return "spectrogram"
    if background is not None and background >= 0.5:
        return "documents"
    return "medical" if channels == 1 or bits > 8 else PHOTOGRAPHS
