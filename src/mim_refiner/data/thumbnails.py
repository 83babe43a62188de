"""Many small pictures as one image: a page embeds it once and shows parts of it wherever they are needed."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mim_refiner.data.channels import for_display
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import resize_center_crop

SMALLEST, LARGEST = 32, 64  # side of a tile in pixels
JPEG_BLOCK = 16  # tiles of whole blocks do not bleed into one another
QUALITY = 85


def thumbnail_sheet(images: ImageSet, indices: Sequence[int]) -> dict[str, Any]:
    """Draw the centre squares of ``images`` at ``indices`` (all readable) row by row into one JPEG.

    Returns {"tile" (px), "columns", "count", "jpeg" (base64)}; tile i lies at column i % columns, row i // columns.
    """
    pixels = [for_display(images.load(int(index))) for index in indices]
    short = min(min(image.shape[:2]) for image in pixels)
    tile = int(min(LARGEST, max(SMALLEST, short // JPEG_BLOCK * JPEG_BLOCK)))
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    sheet = np.full((rows * tile, columns * tile, 3), 255, dtype=np.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * tile, number % columns * tile
        sheet[top : top + tile, left : left + tile] = resize_center_crop(image, tile, 1.0)
    return {"tile": tile, "columns": columns, "count": len(pixels), "jpeg": encode(sheet, "JPEG", quality=QUALITY)}


def encode(pixels: NDArray[np.uint8], kind: str, **options: Any) -> str:
    """Encode uint8 [H, W, 3] to base64 text."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()
