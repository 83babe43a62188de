"""One measured number with all that is needed to judge and repeat it, and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.core.metrics import crossed_interval, mean_iou_interval, paired_interval
from mim_refiner.files import json_value


@dataclass(frozen=True)
class Result:
    """A metric of one block and pooling. The fields up to ``version`` are the public JSON contract.

    ``ci95`` is None for metrics without a sampling interval (rank, NMI, ARI ...). What allows paired comparisons stays
    out of the JSON: ``correct`` per test image in test order, [N], or [draws, N] when several training sets were drawn
    (shares where an image was judged several times), ``confusions``, pixel counts per test image [N, C, C], and
    ``drawn``, the value on resamples of the images, the same ones for every encoder [R].
    ``record``: what the report draws of the protocol, a file of its own.
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
    model_sha256: str
    seed: int
    version: str = __version__
    correct: NDArray[Any] | None = field(default=None, repr=False, compare=False)
    confusions: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    record: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    drawn: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """File name stem, unique within one evaluation, e.g. ``knn_top1-block11-cls``."""
        return f"{self.metric}-block{self.block:02d}-{self.pooling}"

    def to_json(self) -> dict[str, Any]:
        """Return exactly the contract's fields; a value that is not finite becomes None."""
        record = {key: getattr(self, key) for key in CONTRACT_FIELDS}
        value = self.value if math.isfinite(self.value) else None
        return {key: json_value(item) for key, item in {**record, "value": value}.items()}


CONTRACT_FIELDS = tuple(each.name for each in fields(Result) if each.repr)


def paired_change(before: Result, after: Result) -> tuple[float, float, float] | None:
    """(difference after - before, low, high), 95 %, on the same test images; None where nothing per image is known."""
    if before.confusions is not None and after.confusions is not None:
        return mean_iou_interval(after.confusions, before.confusions)
    if before.drawn is not None and after.drawn is not None and before.drawn.shape == after.drawn.shape:
        half, change = 1.96 * float((after.drawn - before.drawn).std(ddof=1)), after.value - before.value
        return change, change - half, change + half
    if after.protocol == "clustering":  # hits under the clusterings found say nothing of how much these vary
        return None
    if before.correct is None or after.correct is None or before.correct.shape != after.correct.shape:
        return None
    if before.correct.ndim == 2 or before.correct.dtype != bool:
        return crossed_interval(np.atleast_2d(after.correct.astype(float) - before.correct))
    return paired_interval(before.correct, after.correct)
