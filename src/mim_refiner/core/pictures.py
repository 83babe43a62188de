"""Pictures of Pillow as they are shown: upright, transparency on white, of 16 bits the upper 8."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mim_refiner.errors import InputError


def upright(image: Image.Image) -> Image.Image:
    """The image as EXIF says that it is shown; the same object where nothing is to be turned."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata around whole pixels: show them as they are
        return image


def on_white(image: Image.Image) -> Image.Image:
    """In RGB; the same object where it is that and nothing of it is transparent."""
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def shown(picture: Any) -> Any:
    """A picture in memory in RGB, as data/image_files.py reads one; what is none of Pillow's stays as it is.

    Raises InputError for float values, which that refuses too. TIFFs of 9 to 15 bits are not spread over 16 here.
    """
    if not isinstance(picture, Image.Image):
        return picture
    if picture.mode == "F":  # Pillow would cut them off at 0 and 255 without a word
        raise InputError("the picture holds float values; convert it to uint8 or uint16")
    picture = upright(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    return on_white(picture)
