"""Every setting refuses every kind of nonsense in words of this package, none of pydantic's."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mim_refiner.checkpoints.families.described import OwnKeyMap, read_key_map
from mim_refiner.errors import InputError, RecipeError
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.settings import Settings, changed, known_keys, read_setting, setting_texts
from mim_refiner.training.recipes import pretrain_recipe, refine_recipe

NONSENSE: list[Any] = [
    "nonsense", "", None, True, -1, 0, 1.5, 10**12, 10**400, float("nan"), float("inf"), [], {}, [[]], ["x"], [0.5],
    [{}], [True], {"a": 1}, {1: {}}, [1, 2, 3, 4, 5, 6, 7],
]  # fmt: skip
PYDANTICS = re.compile(r"[Ii]nput should|Extra inputs|permitted|Value error|Field required|[Vv]alid |validation|\bitem")


@pytest.mark.parametrize(
    "base", [refine_recipe("tiny", image_size=0), pretrain_recipe(None, image_size=0), EvaluationSettings()]
)
def test_no_value_of_any_setting_is_refused_in_other_words(base: Settings) -> None:
    said = []
    for key in known_keys(base):
        for value in NONSENSE:
            try:
                changed(base, [(key, value)])
            except RecipeError as error:
                said.append(str(error))
    assert len(said) > 300
    assert [line for line in said if PYDANTICS.search(line) or "cannot be used" in line or "\n" in line] == []


def test_no_key_map_is_refused_in_other_words() -> None:
    said = []
    for name in (*OwnKeyMap.model_fields, "kes"):
        for value in NONSENSE:
            try:
                read_key_map({name: value})
            except InputError as error:
                said.append(str(error))
    assert len(said) > 100
    assert [line for line in said if PYDANTICS.search(line) or "cannot be used" in line or "\n" in line] == []


def test_text_of_a_mapping_arrives_as_it_was_written() -> None:
    """JSON escapes write a character beyond 16 bits as two halves, which YAML took for two characters."""
    texts = ["a \U0001f600 b", "\U00020bb7", "é \x85\u2028\x7f", "a file's \udcfc", "\\ud83d\\ude00", "\ufeffx"]
    assert [read_setting(each) for each in setting_texts({"names": texts, "\U0001f600": 1})] == [
        ("names", texts), ("\U0001f600", 1),
    ]  # fmt: skip
    assert read_setting(r'name="\ud83d\ude00"') == ("name", "\U0001f600")
