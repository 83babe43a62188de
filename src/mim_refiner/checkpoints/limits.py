"""Bounds on what a file may make us build: a name or a config.json must not cost memory that no encoder needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mim_refiner.errors import CheckpointError

MAX_DEPTH = 512  # blocks; the deepest published encoders have under 100
MAX_CHANNELS = 4096  # of images; hyperspectral sensors have some hundred
MAX_PIXELS = 2**27  # of an image size that is asked for
MAX_SIZE = 2**20  # width, pixels, heads, channels


def check_architecture(name: str, where: str) -> None:
    """CheckpointError for a name with a scheme: timm would fetch "hf-hub:..." or open "local-dir:..."."""
    if ":" in name or "/" in name:
        raise CheckpointError(
            f"{where}: its architecture {ascii(name)[:80]} is an address, not the name of a timm model, and was not "
            "followed; correct its config.json"
        )


def check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    """CheckpointError for constructor arguments beyond any encoder's: a damaged or hostile name or config.json."""
    for name, value in arguments.items():
        bound = MAX_DEPTH if "depth" in name else MAX_SIZE
        values = value if isinstance(value, list | tuple) else (value,)
        numbers = [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]
        if any(not abs(number) <= bound for number in numbers):
            shown = str(value)[:40]
            raise CheckpointError(
                f"{where}: {name}={shown} is beyond any encoder's (at most {bound}); the file or its config.json is "
                "damaged, take it from its source again"
            )
