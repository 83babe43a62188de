"""Settings of the protocols, and the ``--set key=value`` form of changing them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mim_refiner.errors import InputError, did_you_mean
from mim_refiner.evaluation.attentive import AttentiveSettings
from mim_refiner.evaluation.finetune import FinetuneSettings
from mim_refiner.evaluation.linear_probe import LinearProbeSettings
from mim_refiner.evaluation.long_tail import LongTailSettings
from mim_refiner.evaluation.low_shot import LowShotSettings
from mim_refiner.evaluation.robustness import RobustnessSettings
from mim_refiner.evaluation.segmentation import SegmentationSettings
from mim_refiner.types import ImageSize

QUICK_CLUSTER_SEEDS = 10
LARGEST = 10**9  # beyond it lie mistyped numbers


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the protocols; the defaults are the paper's where method.md gives them.

    One exception: ``linear.augment`` is off (one forward pass, not one an epoch); the suite ``paper`` turns it on.
    """

    knn_k: int = 10
    knn_temperature: float = 0.07
    knn_last: int = 4  # also the concatenation of so many last blocks; 0 or 1: not
    cluster_seeds: int = 100
    cluster_bootstrap: int = 0  # resamples that are clustered anew for the intervals, 2 or more; 0: Wilson's
    linear: LinearProbeSettings = field(default_factory=LinearProbeSettings)
    attentive: AttentiveSettings = field(default_factory=AttentiveSettings)
    low_shot: LowShotSettings = field(default_factory=LowShotSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    long_tail: LongTailSettings = field(default_factory=LongTailSettings)
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    robustness: RobustnessSettings = field(default_factory=RobustnessSettings)
    test_share: float = 0.2  # held out of train when there is no test set
    image_size: ImageSize | None = None  # None: the encoder's own
    batch_size: int = 256
    precision: str = "fp32"

    @classmethod
    def quick(cls, **changes: Any) -> EvaluationSettings:
        """For comparisons along the way: one block, one pooling at a time, few starts of the clustering."""
        quick = cls(
            knn_last=1,
            cluster_seeds=QUICK_CLUSTER_SEEDS,
            linear=LinearProbeSettings(last=1, concatenate=False),
            robustness=RobustnessSettings(images=1000),
        )
        return dataclasses.replace(quick, **changes)

    @classmethod
    def paper(cls, **changes: Any) -> EvaluationSettings:
        """Every setting of the paper: the linear probe sees new crops every epoch."""
        return dataclasses.replace(cls(linear=LinearProbeSettings(augment=True)), **changes)

    @classmethod
    def from_overrides(cls, items: Iterable[str] | None, base: EvaluationSettings | None = None) -> EvaluationSettings:
        """Apply ``["knn_k=20", "linear.epochs=10", "linear.learning_rates=[0.1, 0.2]"]`` to ``base`` (the defaults).

        Raises InputError for an unknown key (naming the nearest), a missing ``=`` or a value of the wrong type.
        """
        settings = base or cls()
        for item in items or ():
            key, equals, text = item.partition("=")
            if not equals:
                raise InputError(f"setting {item!r}: write it as key=value")
            settings = _replaced(settings, key.strip(), text.strip())
        return settings


def _replaced(settings: EvaluationSettings, key: str, text: str) -> EvaluationSettings:
    known = _known_keys(settings)
    if key not in known:
        raise InputError(f"setting {key!r} is unknown{did_you_mean(key, known)}; known: {', '.join(known)}")
    value = _parse(key, text, known[key])
    group, dot, name = key.partition(".")
    if dot:
        return dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **{name: value})})
    return dataclasses.replace(settings, **{key: value})


def _known_keys(settings: EvaluationSettings) -> dict[str, Any]:
    """{key: present value}; the fields of a protocol's settings as ``linear.<name>``."""
    known: dict[str, Any] = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            known |= {f"{item.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        else:
            known[item.name] = value
    return known


def _parse(key: str, text: str, default: Any) -> Any:
    """Read ``text`` as the type of the default; whole numbers pass for floats."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    parsed: Any
    if isinstance(default, tuple):
        parsed = _parse_list(value, default)
    elif isinstance(default, bool):
        parsed = value if isinstance(value, bool) else None
    elif isinstance(default, float):
        endless = key == "knn_temperature" and value in ("inf", math.inf)
        parsed = float(value) if endless or _is_number(value) else None
    elif isinstance(default, str):
        parsed = value if isinstance(value, str) else None
    else:
        lowest = 1 if default is None or default > 0 else default
        may_be_zero = key in ("knn_last", "linear.last", "attentive.mixture", "attentive.maps")
        parsed = value if type(value) is int and (0 if may_be_zero else lowest) <= value <= LARGEST else None
    if parsed is not None:
        return parsed
    if isinstance(default, tuple):
        kind = "names" if default and isinstance(default[0], str) else "numbers"
    else:
        kind = "a whole number above 0" if default is None else f"like {json.dumps(default)}"
    raise InputError(f"setting {key}={text[:60]}: must be {kind} (finite, at most {LARGEST})")


def _parse_list(value: Any, default: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if default and isinstance(default[0], str):
        names = value if isinstance(value, list) else str(value).split(",")
        return tuple(names) if all(isinstance(name, str) and name for name in names) else None
    numbers = value if isinstance(value, list) else [value]
    if not all(_is_number(number) for number in numbers):
        return None
    whole = all(isinstance(number, int) for number in (*default, *numbers)) and bool(default)
    return tuple(numbers) if whole else tuple(float(number) for number in numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
