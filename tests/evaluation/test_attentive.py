"""Attentive probes against one slow torch module a rate, and on problems where only attention can help."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation import attentive
from mim_refiner.evaluation.attentive import (
    AttentiveProbe,
    AttentiveSettings,
    attentive_protocol,
    sources_of,
)
from mim_refiner.evaluation.finetune import FinetuneSettings, LabelledRows, finetune
from mim_refiner.evaluation.linear_probe import LinearProbeSettings
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.splits import stratified_folds
from mim_refiner.evaluation.suite import evaluate_backbone, write_results
from mim_refiner.models.backbone import Backbone
from mim_refiner.report.page import write_report
from mim_refiner.types import BackboneInfo, BlockOutput

QUICK = AttentiveSettings(learning_rates=(1e-3, 1e-2), queries=4, epochs=2, batch_size=16, maps=2)


class SlowProbe(nn.Module):
    """One rate, written from the paper: values of every token first, each query reads its own part of them."""

    def __init__(self, start, blocks, dim):
        super().__init__()
        self.query, self.bias = nn.Parameter(start["query"].clone()), nn.Parameter(start["bias"].clone())
        self.values = nn.Parameter(torch.cat(list(start["value"]), dim=1))  # [D, D']
        self.weight, self.mix = nn.Parameter(start["weight"].clone()), nn.Parameter(start["mix"].clone())
        self.norm, self.blocks, self.dim = nn.BatchNorm1d(len(start["weight"]), affine=False, eps=1e-6), blocks, dim

    def forward(self, tokens):
        shares = self.mix.softmax(0)
        outputs = []
        for row in range(len(next(iter(tokens.values())))):
            x = sum(share * tokens[block][row] for share, block in zip(shares, self.blocks, strict=True))  # [N, D]
            values = (x @ self.values).chunk(len(self.query), dim=1)
            read = [(x @ query / math.sqrt(self.dim)).softmax(0) @ part
                    for query, part in zip(self.query, values, strict=True)]  # fmt: skip
            outputs.append(torch.cat(read))
        return self.norm(torch.stack(outputs)) @ self.weight + self.bias


@pytest.mark.parametrize("blocks", [(1,), (0, 1)])
def test_every_rate_equals_a_probe_trained_alone(blocks):
    generator = torch.Generator().manual_seed(0)
    store = {block: torch.randn(40, 5, 8, generator=generator).half().numpy() for block in (0, 1)}
    labels = torch.arange(40) % 3
    settings = QUICK.model_copy(update={"value_divisor": 2, "weight_decay": 0.1})
    probe = AttentiveProbe(blocks, 8, 3, 4, settings, seed=5)
    slow = [SlowProbe(dict(rate.items()), blocks, 8).double() for rate in probe.rates]
    attentive._fit([probe], store, np.arange(40), labels, settings, Run(seed=3))
    for alone, rate, found in zip(slow, settings.learning_rates, probe.rates, strict=True):
        optimizer = torch.optim.AdamW(alone.parameters(), betas=(0.9, 0.999), weight_decay=0.1)
        draws, total, warmup, peak = torch.Generator().manual_seed(3), 4, 0, rate * 16 / 256
        for step in range(total):
            if step % 2 == 0:
                order = torch.randperm(40, generator=draws)
            rows = order[step % 2 * 16 :][:16].sort().values
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
            optimizer.param_groups[0]["lr"] = rate * 1e-6 + (peak - rate * 1e-6) * cosine
            optimizer.zero_grad()
            tokens = {block: torch.from_numpy(values)[rows].double() for block, values in store.items()}
            F.cross_entropy(alone(tokens), labels[rows]).backward()
            optimizer.step()
        for name in ("query", "weight", "bias", "mix"):
            torch.testing.assert_close(found[name].double(), getattr(alone, name), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(torch.cat(list(found["value"]), 1).double(), alone.values, rtol=1e-3, atol=2e-5)
    tokens = {block: torch.from_numpy(values).float() for block, values in store.items()}
    logits = probe.eval()(tokens)
    for number, alone in enumerate(slow):
        expected = alone.eval()({block: x.double() for block, x in tokens.items()})
        torch.testing.assert_close(logits[:, number].double(), expected, rtol=1e-3, atol=1e-3)
    weights, _ = probe.attend(tokens)
    assert weights.shape == (40, 2, 4, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, 2, 4))


class Colours(nn.Module):
    """An encoder of two blocks whose tokens are a linear map of the patches' mean colours."""

    grid_of = Backbone.grid_of

    def __init__(self, block_dims=(12, 12)):
        super().__init__()
        self.block_dims = block_dims
        self.maps = nn.ParameterList(torch.randn(3, d, generator=torch.Generator().manual_seed(d)) for d in block_dims)
        self.model = nn.Module()  # what results are named by
        self.info = BackboneInfo("made", "colours", block_dims[-1], 2, 1, (8, 8), 0, False, (32, 32), 3,
                                 (0.5,) * 3, (0.25,) * 3, "", 1.0)  # fmt: skip

    def forward_blocks(self, images, blocks, *, class_token_last=False):
        colours = F.avg_pool2d(images, 8).flatten(2).mT
        return [BlockOutput(None, colours @ self.maps[block]) for block in blocks]


@pytest.fixture
def planted(tmp_path):
    """Return a maker of images of 16 patches, four of each of four colours in any order; the one that is marked red
    tells the class. The mean of the patches is the same for every class."""

    def make(count, seed):
        rng = np.random.default_rng(seed)
        codes = np.array([(40, 40), (40, 215), (215, 40), (215, 215)])
        labels, images = np.arange(count) % 4, np.zeros((count, 32, 32, 3), np.uint8)
        for image, label in zip(images, labels, strict=True):
            kinds = rng.permutation(np.repeat(np.arange(4), 4))
            marked = rng.choice(np.flatnonzero(kinds == label))
            patches = np.concatenate([np.where(np.arange(16) == marked, 250, 5)[:, None], codes[kinds]], axis=1)
            image[:] = patches.reshape(4, 4, 3).repeat(8, 0).repeat(8, 1)
        images = (images + rng.integers(-5, 6, images.shape)).clip(0, 255).astype(np.uint8)
        np.savez(tmp_path / f"{seed}.npz", images=images, labels=labels)
        return ImageSet(open_source(tmp_path / f"{seed}.npz"))

    return make


def test_attention_finds_what_the_mean_of_the_patches_hides(planted, tmp_path, monkeypatch):
    """The signal sits in one random patch: the linear probe on the mean is at chance, both poolers solve it."""
    settings = EvaluationSettings(
        linear=LinearProbeSettings(last=1, epochs=20, batch_size=64),
        attentive=QUICK.model_copy(
            update={"learning_rates": (3e-2, 0.1), "epochs": 20, "batch_size": 64, "mixture": 2}
        ),
    )
    places = []
    stored = attentive._stored
    monkeypatch.setattr(attentive, "_stored", lambda *given: places.append(given[-1]) or stored(*given))
    train, test = planted(256, 1), planted(120, 2)
    found = evaluate_backbone(Colours(), train, test, protocols=("linear", "attentive"), settings=settings)
    write_results(found.values(), tmp_path / "run")
    assert found["linear_top1_best-block01-mean"].value < 0.4
    for name in ("ep", "single"):
        assert found[f"attentive_top1-block01-{name}"].value > 0.9
        assert found[f"attentive_top1_mixture-block01-{name}"].value > 0.9
        result = found[f"attentive_top1_best-block01-{name}"]
        assert result.value >= found[f"attentive_top1-block01-{name}"].value
        assert result.ci95[0] <= result.value == pytest.approx(result.correct.mean())
    mixture = found["attentive_top1_mixture-block01-ep"].settings
    assert mixture["selection"] == "best by 3-fold cross-validation on train"
    assert (mixture["blocks"], mixture["queries"]) == ([0, 1], 4)
    assert sum(mixture["block_weights"]) == pytest.approx(1)
    assert mixture["parameters"] == 4 * 12 + 12 * 12 + 12 * 4 + 4 + 2
    assert not places[0].exists()  # nothing of the tokens stays

    record = json.loads((tmp_path / "run" / "evaluation" / "attentive.json").read_text())
    assert [len(probe["maps"]) for probe in record["probes"]] == [4, 1, 4, 1]  # mean and three queries, or the one
    assert record["probes"][0]["grid"] == [4, 4]
    page = write_report([tmp_path / "run"]).read_text()
    assert "Where the attentive probes look" in page
    assert page.count("ep, block 1, mean of 4 queries") == 2  # of two images


def rows(images):
    return LabelledRows(images, np.arange(len(images)), images.labels)


def test_the_marked_patch_stands_out_in_the_map_of_the_single_query(planted):
    """Leaving it out tells the class as well as reading it: three of its colour remain."""
    settings = QUICK.model_copy(
        update={"learning_rates": (0.1,), "epochs": 30, "batch_size": 64, "poolers": ("single",)}
    )
    test = planted(20, 3)
    [score] = attentive_protocol(
        Colours(), rows(planted(256, 1)), rows(test), [(1,)], settings.model_copy(update={"maps": 20}), image_size=32
    ).values()
    red = np.stack([test.load(row)[4::8, 4::8, 0].ravel() for row in range(20)])
    read, left_out = (
        extreme == red.argmax(1) for extreme in (score.attention[:, 0].argmax(1), score.attention[:, 0].argmin(1))
    )
    assert max(read.mean(), left_out.mean()) > 0.9
    np.testing.assert_allclose(score.attention.sum(2), 1, rtol=1e-4)


def test_the_rate_is_chosen_without_the_test_set(make_backbone, make_images):
    train, test = make_images(40), make_images(20, seed=1)
    turned = dataclasses.replace(rows(test), labels=np.roll(test.labels, 1))
    first, second = (
        attentive_protocol(make_backbone(), rows(train), each, [(2,)], QUICK, image_size=32)
        for each in (rows(test), turned)
    )
    for key, score in first.items():
        assert score.accuracy.selected_rate == second[key].accuracy.selected_rate
    whole = QUICK.model_copy(update={"held_out": 0.0, "class_token": True})
    for score in attentive_protocol(make_backbone(), rows(train), rows(test), [(2,)], whole, image_size=32).values():
        assert score.accuracy.selected is None
        assert score.attention.shape[2] == 17  # 16 patches and the class token


def test_with_few_images_the_rate_is_chosen_on_each_third_and_the_scored_probe_trains_on_all(planted, monkeypatch):
    trained, fit = [], attentive._fit
    monkeypatch.setattr(attentive, "_fit", lambda *given: trained.append(given[2]) or fit(*given))
    train, test = rows(planted(60, 1)), rows(planted(20, 2))
    settings = QUICK.model_copy(update={"learning_rates": (0.01, 0.1), "epochs": 10, "poolers": ("ep",)})
    [score] = attentive_protocol(Colours(), train, test, [(1,)], settings, image_size=32).values()
    folds = stratified_folds(train.labels, 3, 0)
    assert [len(kept) for kept in trained] == [40, 40, 40, 60]
    assert all(set(kept) == set(range(60)) - set(fold) for kept, fold in zip(trained, folds, strict=False))
    whole = settings.model_copy(update={"held_out": 0.0})
    right = 0.0
    for fold, kept in zip(folds, trained, strict=False):  # slowly: a probe for each part, scored on it as on a test set
        [found] = attentive_protocol(
            Colours(), train.select(kept), train.select(fold), [(1,)], whole, image_size=32
        ).values()
        right += np.array(found.accuracy.by_rate) * len(fold)
    assert score.accuracy.selected_rate == settings.learning_rates[right.argmax()]
    assert score.accuracy.held_out_accuracy == pytest.approx(right.max() / 60)
    [trained_on_all] = attentive_protocol(Colours(), train, test, [(1,)], whole, image_size=32).values()
    assert score.accuracy.by_rate == trained_on_all.accuracy.by_rate


def test_more_queries_than_the_width_divides_are_lowered_and_widths_that_differ_are_not_mixed(
    make_backbone, make_images
):
    train, test = make_images(40), make_images(20, seed=1)
    settings = EvaluationSettings(attentive=QUICK.model_copy(update={"queries": 24, "mixture": 2}))
    found = evaluate_backbone(make_backbone(), train, test, protocols=("attentive",), settings=settings)
    assert found["attentive_top1-block02-ep"].settings["queries"] == 8  # of 32
    found = evaluate_backbone(Colours((12, 8)), train, test, protocols=("attentive",), settings=settings)
    assert {result.settings["blocks"] == [1] for result in found.values()} == {True}


@pytest.mark.parametrize(("depth", "mixed"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (3, (0, 1, 2)), (1, None)])
def test_mixtures_are_spread_over_the_depth(depth, mixed):
    encoder = SimpleNamespace(info=SimpleNamespace(depth=depth), block_dims=[8] * depth)
    assert sources_of(encoder, [0], 4) == [(0,), *([mixed] if mixed else [])]
    assert sources_of(encoder, [0], 0) == [(0,)]


def test_a_width_that_the_divisor_does_not_divide_is_refused_before_a_token_is_computed(
    make_backbone, make_images, monkeypatch
):
    monkeypatch.setattr(attentive, "_stored", None)
    images, settings = rows(make_images(40)), QUICK.model_copy(update={"value_divisor": 5})
    with pytest.raises(InputError, match=r"value_divisor 5 does not divide the width 32"):
        attentive_protocol(make_backbone(), images, images, [(2,)], settings, image_size=32)


def test_a_class_token_that_is_not_there_is_not_asked_for(make_backbone, make_images):
    images, bare = rows(make_images(12)), make_backbone(class_token=False, global_pool="avg")
    settings = QUICK.model_copy(update={"class_token": True})
    with pytest.raises(InputError, match=r"attentive\.class_token: this encoder has no class token"):
        attentive_protocol(bare, images, images, [(2,)], settings, image_size=32)
    with pytest.raises(InputError, match="no class token; use pooling mean"):
        finetune(bare, images, images, FinetuneSettings(pooling="cls"), image_size=32)


def test_the_tokens_wait_on_the_disk(tmp_path):
    batches = [{1: torch.full((3, 4, 8), 0.5)}, {1: torch.full((2, 4, 8), 2.0)}]
    store = attentive._stored(iter(batches), 5, tmp_path)
    assert isinstance(store[1], np.memmap)  # so that memory holds what a batch reads
    assert store[1][:, 0, 0].tolist() == [0.5, 0.5, 0.5, 2.0, 2.0]
    assert (tmp_path / "1.npy").stat().st_size == 128 + 2 * 5 * 4 * 8


def test_a_disk_without_room_is_refused_before_anything_is_written(make_backbone, make_images, monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(attentive.shutil, "disk_usage", lambda _: usage)
    images = rows(make_images(40))
    with pytest.raises(InputError, match=r"need 0.0 GB in .*which has 0.0 GB free; name fewer --blocks"):
        attentive_protocol(make_backbone(), images, images, [(2,)], QUICK, image_size=32, folder=tmp_path)
    assert not list(tmp_path.glob("mim-refiner-tokens-*"))


def test_images_that_vanish_meanwhile_are_said(make_backbone, make_images, monkeypatch):
    images = rows(make_images(40))
    every = attentive.eval_batches

    def fewer(*given, **named):
        return ((pixels[:-1], positions[:-1]) for pixels, positions in every(*given, **named))

    monkeypatch.setattr(attentive, "eval_batches", fewer)
    with pytest.raises(DataError, match="1 image became unreadable"):
        attentive_protocol(make_backbone(), images, images, [(2,)], QUICK, image_size=32)
