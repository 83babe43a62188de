"""One measured number with all that is needed to judge and repeat it, and its JSON file."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.errors import RunFolderError


@dataclass(frozen=True)
class Result:
    """A metric of one block and pooling. The fields up to ``version`` are the public JSON contract.

    ``ci95`` is None for metrics without a sampling interval (rank, NMI, ARI). ``correct`` [N] (per test image, in
    test order) allows paired comparisons and stays out of the JSON.
    """

    protocol: str
    metric: str
    value: float
    ci95: tuple[float, float] | None
    block: int
    pooling: str
    norm: bool
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    model_sha256: str | None
    seed: int
    version: str = __version__
    correct: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """File name stem, unique within one evaluation."""
        return result_name(self.metric, self.block, self.pooling)

    def to_json(self) -> dict[str, Any]:
        """Return exactly the contract's fields; a value that is not finite becomes None."""
        record = {key: getattr(self, key) for key in CONTRACT_FIELDS}
        value = self.value if math.isfinite(self.value) else None
        return {key: json_value(item) for key, item in {**record, "value": value}.items()}


CONTRACT_FIELDS = (
    "protocol", "metric", "value", "ci95", "block", "pooling", "norm", "settings", "data", "model_sha256", "seed",
    "version",
)  # fmt: skip


def result_name(metric: str, block: int, pooling: str) -> str:
    """E.g. ``knn_top1-block11-cls``."""
    return f"{metric}-block{block:02d}-{pooling}"


def json_value(value: Any) -> Any:
    """Tuples to lists, and numbers that JSON lacks to text: a k-NN temperature of ``"inf"``."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON so that readers see the old file or the whole new one; RunFolderError when that is not possible."""
    return write_bytes(path, (json.dumps(json_value(value), indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file by way of a temporary neighbour; the folder is made. RunFolderError when that is not possible."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot write ({error.strerror or error}); choose a folder that can be written"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
