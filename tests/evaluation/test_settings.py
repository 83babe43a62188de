from __future__ import annotations

import pytest

from mim_refiner.errors import RecipeError
from mim_refiner.evaluation.linear_probe import LEARNING_RATES
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.suite import PROTOCOLS


def test_defaults_are_those_of_the_method():
    settings = EvaluationSettings()
    assert (settings.knn_k, settings.knn_temperature) == (10, 0.07)
    assert (settings.linear.epochs, settings.linear.batch_size, settings.linear.momentum) == (50, 1024, 0.9)
    assert settings.linear.learning_rates == LEARNING_RATES
    assert len(LEARNING_RATES) == 13
    assert (LEARNING_RATES[0], LEARNING_RATES[-1]) == (1e-4, 0.5)


def test_the_rest_of_the_papers_settings():
    settings = EvaluationSettings()
    assert (settings.knn_last, settings.cluster_seeds) == (4, 100)
    assert (settings.linear.last, settings.linear.concatenate, settings.linear.crop_scale) == (4, True, (0.08, 1.0))
    assert (settings.linear.augment, EvaluationSettings.paper().linear.augment) == (False, True)
    low = settings.low_shot
    assert (low.shots, low.splits, low.penalty, low.scoring) == ((1, 2, 5), 3, 0.00025, "same")
    tuned = settings.finetune
    assert (tuned.epochs, tuned.lr, tuned.layer_decay, tuned.drop_path) == (50, 1e-3, 0.75, 0.2)
    assert (tuned.mixup, tuned.cutmix, tuned.shares, tuned.warmup_epochs) == (0.8, 1.0, (0.01, 0.1, 1.0), 5.0)
    assert (settings.segmentation.every, settings.segmentation.count) == (4, 4)
    assert len(settings.robustness.kinds) == 12
    assert settings.robustness.severities == (1, 2, 3, 4, 5)


def test_overrides_of_every_kind():
    changed = EvaluationSettings.from_overrides(
        ["low_shot.shots=[1, 3]", "low_shot.scoring=reference", "finetune.shares=0.1", "robustness.kinds=fog,jpeg",
         "robustness.images=50", "linear.augment=true", "knn_last=0", "segmentation.window=96",
         "finetune.randaugment=", "finetune.workers=-1", "segmentation.memory_gb=8"],
        EvaluationSettings.quick(),
    )  # fmt: skip
    assert (changed.low_shot.shots, changed.low_shot.scoring) == ((1, 3), "reference")
    assert (changed.finetune.shares, changed.finetune.randaugment) == ((0.1,), "")
    assert (changed.robustness.kinds, changed.robustness.images) == (("fog", "jpeg"), 50)
    assert (changed.linear.augment, changed.knn_last, changed.segmentation.window) == (True, 0, 96)
    assert changed.cluster_seeds == 10  # from the base


def test_overrides():
    settings = EvaluationSettings.from_overrides(
        [
            "knn_k=20",
            "knn_temperature=inf",
            "image_size=64",
            "precision=bf16",
            "linear.epochs = 5",
            "linear.held_out=0",
            "linear.learning_rates=[1e-3, 1]",
        ]
    )
    assert (settings.knn_k, settings.knn_temperature, settings.image_size) == (20, float("inf"), 64)
    assert settings.precision == "bf16"
    assert (settings.linear.epochs, settings.linear.held_out) == (5, 0.0)
    assert settings.linear.learning_rates == (0.001, 1.0)
    assert EvaluationSettings.from_overrides(None) == EvaluationSettings()


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("knn_kk=3", "did you mean 'knn_k'"),
        ("linear.epoch=3", "did you mean 'linear.epochs'"),
        ("zzz=3", "use a key of docs/evaluation.md"),
        ("knn_k", "key=value"),
        ("knn_k=many", "knn_k: must be a whole number"),
        ("knn_k=0", "must be 1 or more"),
        ("knn_k=true", "true and false are no numbers"),
        ("linear.learning_rates=[0.1, true]", "true and false are no numbers"),
        ("low_shot.shots=[true]", "true and false are no numbers"),
        ("image_size=[true, true]", "true and false are no numbers"),
        ("knn_temperature=.nan", "must be above 0"),
        ("image_size=1.5", "must be a whole number from 1 to 16384 or HEIGHTxWIDTH"),
        ("cluster_bootstrap=1", "one resample tells no interval"),
        ("linear.learning_rates=fast", "must be a number"),
        ("linear.learning_rates=[]", "must have 1 or more values"),
        ("linear.learning_rates=[0.2, 0.1]", "must be ascending"),
        ("linear.epochs=0", "linear.epochs: .*must be 1 or more"),
        ("linear.batch_size=1", "must be 2 or more"),
        ("linear.held_out=1.0", "must be below 1"),
        ("attentive.poolers=ep,mean", r"attentive.poolers.1: must be 'ep' or 'single' \(got 'mean'\)"),
        ("attentive.poolers=mean", r"attentive.poolers.0: [^;]*\(got 'mean'\); correct"),
        ("attentive.weight_decay=-1", "must be 0 or more"),
        ("low_shot.shots=0", "low_shot.shots.0"),
        ("low_shot.scoring=odd", "'same' or 'reference'"),
        ("low_shot.penalty=0", "must be above 0"),
        ("finetune.shares=0", "finetune.shares.0: must be above 0"),
        ("finetune.pooling=max", "'auto', 'cls' or 'mean'"),
        ("finetune.drop_path=1", "must be below 1"),
        ("finetune.workers=-2", "must be -1 or more"),
        ("long_tail.imbalance=0.5", "must be 1 or more"),
        ("long_tail.few=500", r"few \(500\) must be at most many \(100\)"),
        ("long_tail.methods=svm", "'knn', 'linear' or 'finetune'"),
        ("robustness.kinds=fogg", "did you mean 'fog'"),
        ("robustness.severities=6", "must be 5 or less"),
        ("segmentation.stride=0", "must be above 0"),
    ],
)
def test_bad_overrides_are_one_clear_line(item, words):
    with pytest.raises(RecipeError, match=words) as caught:
        EvaluationSettings.from_overrides([item])
    assert "\n" not in str(caught.value)


def test_a_list_of_one_wrong_item_is_not_called_too_short():
    for item in ("attentive.poolers=mean", "attentive.learning_rates=[0]", "low_shot.shots=0"):
        with pytest.raises(RecipeError) as caught:
            EvaluationSettings.from_overrides([item])
        assert "or more values" not in str(caught.value)


@pytest.mark.parametrize(
    ("off", "idle", "words"),
    [
        (["finetune.split_files=a.txt"], "finetune.shares=0.1", r"finetune\.shares has no effect with .*\['a.txt'\]"),
        (["low_shot.split_files=a.txt"], "low_shot.shots=1", r"low_shot\.shots has no effect"),
        (["low_shot.split_files=a.txt"], "low_shot.splits=5", r"low_shot\.splits has no effect"),
        ([], "linear.crop_scale=[0.2, 1]", r"linear\.crop_scale has no effect with linear\.augment=false"),
        (["attentive.poolers=single"], "attentive.queries=8", r"attentive\.queries has no effect with .*\['single'\]"),
    ],
)
def test_settings_without_effect_are_refused(off, idle, words):
    with pytest.raises(RecipeError, match=words):
        EvaluationSettings.from_overrides([idle], EvaluationSettings.from_overrides(off))
    if off:  # said in the same breath
        EvaluationSettings.from_overrides([*off, idle])


def test_a_setting_that_no_protocol_reads_is_named():
    used = {
        "knn": {"knn_k", "knn_temperature", "knn_last"},
        "linear": {"linear.epochs"},
        "attentive": {"attentive.epochs"},
        "clustering": {"cluster_seeds", "cluster_bootstrap"},
        "rank": set(),
        "low_shot": {"low_shot.max_iter"},
        "finetune": {"finetune.epochs"},
        "long_tail": {"long_tail.many", "knn_k", "knn_temperature", "linear.epochs", "finetune.epochs"},
        "robustness": {"robustness.images", "knn_k", "knn_temperature", "linear.epochs"},
        "segmentation": {"segmentation.epochs"},
    }
    assert set(used) == set(PROTOCOLS)
    everywhere = {"batch_size", "precision", "image_size", "test_share"}
    for key in set().union(everywhere, *used.values()):
        settings = EvaluationSettings()
        settings._given = (key, "precision")
        for protocol, reads in used.items():
            assert settings.unread([protocol], test=False) == ([] if key in reads | everywhere else [key])
    settings._given = ("test_share", "knn_k")
    assert settings.unread(["rank", "linear"], test=True) == ["test_share", "knn_k"]
    assert EvaluationSettings().unread(["rank"], test=True) == []
