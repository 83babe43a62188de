"""Settings of the protocols, and the ``--set key=value`` form of changing them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mim_refiner.errors import InputError, did_you_mean
from mim_refiner.evaluation.linear_probe import LinearProbeSettings


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the protocols; the defaults are the paper's where method.md gives them."""

    knn_k: int = 10
    knn_temperature: float = 0.07
    linear: LinearProbeSettings = field(default_factory=LinearProbeSettings)
    cluster_seeds: int = 10
    test_share: float = 0.2  # held out of train when there is no test set
    image_size: int | None = None  # None: the encoder's own
    batch_size: int = 256
    precision: str = "fp32"

    @classmethod
    def from_overrides(cls, items: Iterable[str] | None) -> EvaluationSettings:
        """Apply ``["knn_k=20", "linear.epochs=10", "linear.learning_rates=[0.1, 0.2]"]`` to the defaults.

        Raises InputError for an unknown key (naming the nearest), a missing ``=`` or a value of the wrong type.
        """
        settings = cls()
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
    if key.startswith("linear."):
        changed = dataclasses.replace(settings.linear, **{key.removeprefix("linear."): value})
        return dataclasses.replace(settings, linear=changed)
    return dataclasses.replace(settings, **{key: value})


def _known_keys(settings: EvaluationSettings) -> dict[str, Any]:
    """{key: present value}; the fields of the linear probe as ``linear.<name>``."""
    known = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings) if item.name != "linear"}
    probe = {f"linear.{item.name}": getattr(settings.linear, item.name) for item in dataclasses.fields(settings.linear)}
    probe.pop("linear.augment")
    return {**known, **probe}


def _parse(key: str, text: str, default: Any) -> Any:
    """Read ``text`` as the type of the default; whole numbers pass for floats."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(default, float) and value in ("inf", "Infinity"):
        return float("inf")
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, str) and isinstance(value, str):
        return value
    if isinstance(default, tuple):
        numbers = value if isinstance(value, list) else [value]
        if all(isinstance(number, int | float) for number in numbers):
            return tuple(float(number) for number in numbers)
    elif (isinstance(default, int) or default is None) and type(value) is int and value > 0:
        return value
    kind = (
        "numbers" if isinstance(default, tuple) else "a whole number above 0" if default is None else f"like {default}"
    )
    raise InputError(f"setting {key}={text}: must be {kind}")
