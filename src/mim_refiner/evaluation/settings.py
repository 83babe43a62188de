"""Settings of all protocols; ``--set key=value`` changes them, a protocol's own as ``linear.epochs=20``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from operator import not_
from typing import Annotated, Any, ClassVar

from pydantic import AllowInfNan, Field, field_validator

from mim_refiner.evaluation.attentive import AttentiveSettings
from mim_refiner.evaluation.corruptions import RobustnessSettings
from mim_refiner.evaluation.finetune import FinetuneSettings
from mim_refiner.evaluation.linear_probe import LinearProbeSettings
from mim_refiner.evaluation.low_shot import LowShotSettings
from mim_refiner.evaluation.segmentation import SegmentationSettings
from mim_refiner.evaluation.splits import LongTailSettings
from mim_refiner.settings import (
    FrozenSettings,
    Idle,
    NonNegativeInt,
    PositiveInt,
    Precision,
    Size,
    changed,
    read_setting,
)

# the protocols that read a setting, where they are others than its name says
_READERS = {
    "knn_k": {"knn", "long_tail", "robustness"},
    "knn_temperature": {"knn", "long_tail", "robustness"},
    "knn_last": {"knn"},
    "cluster_seeds": {"clustering"},
    "cluster_bootstrap": {"clustering"},
    "linear": {"linear", "long_tail", "robustness"},
    "finetune": {"finetune", "long_tail"},
}


class EvaluationSettings(FrozenSettings):
    """Defaults are the paper's, but for ``linear.augment``, off except in the suite ``paper``: a pass each epoch."""

    noun: ClassVar[str] = "setting"
    listed: ClassVar[str] = "docs/evaluation.md"
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("attentive.poolers", lambda names: "ep" not in names, ("attentive.queries",), "=ep"),
        Idle("finetune.split_files", bool, ("finetune.shares",), "=[]"),
        Idle("linear.augment", not_, ("linear.crop_scale",), "=true"),
        Idle("low_shot.split_files", bool, ("low_shot.shots", "low_shot.splits"), "=[]"),
    )

    knn_k: PositiveInt = 10
    knn_temperature: Annotated[float, Field(gt=0), AllowInfNan(True)] = 0.07
    knn_last: NonNegativeInt = 4  # also the concatenation of so many last blocks; 0 or 1: not
    cluster_seeds: PositiveInt = 100
    cluster_bootstrap: NonNegativeInt = 0  # resamples that are clustered anew for the intervals; 0: Wilson's
    linear: LinearProbeSettings = LinearProbeSettings()
    attentive: AttentiveSettings = AttentiveSettings()
    low_shot: LowShotSettings = LowShotSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    long_tail: LongTailSettings = LongTailSettings()
    segmentation: SegmentationSettings = SegmentationSettings()
    robustness: RobustnessSettings = RobustnessSettings()
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # held out of train when there is no test set
    image_size: Size | None = None  # None: the encoder's own
    batch_size: PositiveInt = 256
    precision: Precision = "fp32"
    _given: tuple[str, ...] = ()

    @field_validator("cluster_bootstrap")
    @classmethod
    def _one_has_no_deviation(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one resample tells no interval; give 0 or 20 and more")
        return value

    @classmethod
    def quick(cls, **changes: Any) -> EvaluationSettings:
        """For comparisons along the way: one block, one pooling at a time, few starts of the clustering."""
        linear = LinearProbeSettings(last=1, concatenate=False)
        quick = {"knn_last": 1, "cluster_seeds": 10, "linear": linear, "robustness": RobustnessSettings(images=1000)}
        return cls(**{**quick, **changes})

    @classmethod
    def paper(cls, **changes: Any) -> EvaluationSettings:
        """Every setting of the paper: the linear probe sees new crops every epoch."""
        return cls(**{"linear": LinearProbeSettings(augment=True), **changes})

    @classmethod
    def from_overrides(cls, items: Iterable[str] | None, base: EvaluationSettings | None = None) -> EvaluationSettings:
        """Apply ``["knn_k=20", "linear.learning_rates=[0.1, 0.2]"]`` to ``base`` (the defaults); raises RecipeError."""
        base, changes = base or cls(), [read_setting(item) for item in items or ()]
        made = changed(base, changes)
        made._given = (*base._given, *(key for key, _ in changes))
        return made

    def unread(self, protocols: Collection[str], *, test: bool) -> list[str]:
        """The overrides that none of ``protocols`` reads, and what only matters without ``test`` images."""
        rest = {"test_share"} if test else set()
        for key in self._given:
            name = key.partition(".")[0]
            if not _READERS.get(name, {name} if "." in key else set(protocols)) & set(protocols):
                rest.add(key)
        return [key for key in dict.fromkeys(self._given) if key in rest]

    def given(self, group: str) -> set[str]:
        """Names of a protocol's settings that overrides have set."""
        return {name for found, _, name in (key.partition(".") for key in self._given) if found == group}
