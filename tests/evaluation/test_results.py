from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mim_refiner.errors import RunFolderError
from mim_refiner.evaluation.results import Result, paired_change
from mim_refiner.files import write_json


def test_json_has_the_contract_fields_and_no_more():
    result = Result(
        protocol="knn",
        metric="knn_top1",
        value=0.5,
        ci95=(0.4, 0.6),
        block=3,
        pooling="cls",
        norm=False,
        settings={"temperature": float("inf"), "rates": (1.0, 2.0)},
        data={},
        model_sha256=None,
        seed=0,
        correct=np.ones(2, bool),
    )
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(record) == [
        "protocol",
        "metric",
        "value",
        "ci95",
        "block",
        "pooling",
        "norm",
        "settings",
        "data",
        "model_sha256",
        "seed",
        "version",
    ]
    assert record["ci95"] == [0.4, 0.6]
    assert record["settings"] == {"temperature": "inf", "rates": [1.0, 2.0]}
    assert result.name == "knn_top1-block03-cls"


def test_paired_change_of_resampled_clusterings_is_by_the_same_resamples():
    def clustered(value, drawn):
        facts = {"settings": {}, "data": {}, "model_sha256": None, "seed": 0}
        return Result("clustering", "nmi", value, None, 3, "cls", False, **facts, drawn=np.array(drawn))

    change = paired_change(clustered(0.2, [0.1, 0.2, 0.3]), clustered(0.5, [0.4, 0.5, 0.6]))
    assert change == pytest.approx((0.3, 0.3, 0.3))  # what both gain or lose by the draw of images is no doubt
    value, low, high = paired_change(clustered(0.2, [0.1, 0.2, 0.3]), clustered(0.5, [0.6, 0.5, 0.4]))
    assert (low, value, high) == pytest.approx((0.3 - 1.96 * 0.2, 0.3, 0.3 + 1.96 * 0.2))
    hits = {"correct": np.ones(3, bool)}
    few = replace(clustered(0.2, [0.1, 0.2]), **hits)  # other resamples: nothing to pair
    assert paired_change(few, replace(clustered(0.5, [0.6, 0.5, 0.4]), **hits)) is None


def test_write_is_whole_or_not_at_all(tmp_path):
    path = write_json(tmp_path / "new" / "a.json", {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": "nan"}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": "nan"}
    assert [item.name for item in path.parent.iterdir()] == ["a.json"]


def test_unusable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})
