"""One measured number with all that is needed to judge and repeat it, and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.files import json_value


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
