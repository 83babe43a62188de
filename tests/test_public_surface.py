"""The public names are a promise: a change here is a change for users and belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

import mim_refiner

PUBLIC = {
    "Backbone", "BackboneInfo", "BlockOutput", "CheckpointReport", "MimRefinerError", "NNAOutput", "NeighborQueue",
    "NeighborResult", "Reporter", "__version__", "analyze", "clustering_accuracy", "doctor", "embed", "evaluate",
    "export", "inspect_checkpoint", "knn_predict", "layer_decay_scales", "load_backbone", "multi_view_nna_loss",
    "nna_loss", "pretrain", "refine", "report", "warmup_cosine",
}  # fmt: skip

# Parameter names in order; a star stands for "keyword-only from here".
SIGNATURES = {
    "nna_loss": "predicted targets neighbors temperature * gather swap_negatives",
    "multi_view_nna_loss": "predicted targets neighbors temperature * gather swap_negatives view_pairing",
    "NeighborQueue": "size dim * top_k",
    "NeighborQueue.lookup": "self z sample_ids * exclude_same generator",
    "NeighborQueue.enqueue": "self z sample_ids",
    "knn_predict": "train_x train_y test_x * k temperature standardize chunk_size",
    "clustering_accuracy": "y_true y_pred",
    "layer_decay_scales": "model decay",
    "load_backbone": "source * image_size num_heads in_chans strict",
    "inspect_checkpoint": "source",
    "Backbone.forward_blocks": "self images block_indices * norm",
}

VERBS = {
    "pretrain": {
        "data", "arch", "out", "model", "recipe", "settings", "device", "seed", "overwrite", "exclude", "log",
        "memory_budget", "plan", "reporter",
    },
    "refine": {
        "data", "model", "out", "recipe", "eval_data", "eval_test", "head_blocks", "settings", "device", "seed",
        "overwrite", "memory_budget", "plan", "exclude", "log", "reporter",
    },
    "evaluate": {
        "model", "data", "test", "compare", "suite", "protocols", "blocks", "pooling", "norm", "shifted", "transfer",
        "out", "cache", "cache_size", "settings", "device", "seed", "reporter",
    },
    "analyze": {"model", "data", "compare", "test", "out", "parts", "cache", "device", "seed", "reporter"},
    "doctor": {"data", "model", "test", "out", "recipe", "device", "reporter"},
    "report": {"runs", "out", "reporter"},
    "embed": {
        "model", "data", "out", "block", "pooling", "norm", "image_size", "batch_size", "precision", "dtype", "device",
        "overwrite", "reporter",
    },
    "export": {
        "model", "format", "out", "block", "pooling", "norm", "batch", "image_size", "data", "push_to_hub", "private",
        "device", "reporter",
    },
}  # fmt: skip


def resolve(path: str) -> object:
    target: object = mim_refiner
    for name in path.split("."):
        target = getattr(target, name)
    return target


def written(path: str) -> str:
    """Write a signature as in SIGNATURES."""
    words: list[str] = []
    starred = False
    for name, parameter in inspect.signature(resolve(path)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(name)
    return " ".join(words)


def test_the_public_names_are_exactly_these():
    assert set(mim_refiner.__all__) == PUBLIC
    assert set(dir(mim_refiner)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_loads(name):
    assert getattr(mim_refiner, name) is not None


@pytest.mark.parametrize("path", sorted(SIGNATURES))
def test_signature_is_the_contract(path):
    assert written(path).startswith(SIGNATURES[path])


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_are_keyword_only(verb):
    parameters = inspect.signature(getattr(mim_refiner, verb)).parameters
    assert set(parameters) == VERBS[verb]
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'refined'"):
        _ = mim_refiner.refined


def test_the_export_verb_survives_the_import_of_the_export_package():
    import mim_refiner.export

    assert inspect.isfunction(mim_refiner.export)


def test_import_loads_no_heavy_module():
    code = (
        "import sys, mim_refiner; print([m for m in ('torch', 'timm', 'numpy', 'rich', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("said", "expected"), [(None, "1"), ("0", "0")])
def test_huge_pages_are_asked_for_before_torch_loads_unless_the_user_decided(said: str | None, expected: str) -> None:
    code = "import os, sys, mim_refiner; print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if said is None else {"THP_MEM_ALLOC_ENABLE": said}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == [expected, "False"]
