"""Guided look-ups against a slow loop over rows and entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mim_refiner.core.guidance import Guide, known_labels
from mim_refiner.core.neighbors import NeighborQueue


@pytest.fixture
def filled():
    """A queue of 40 entries of images 0 to 29 (some twice, ten of the random start), and their labels."""
    torch.manual_seed(0)
    queue = NeighborQueue(40, 6, top_k=5)
    ids = torch.cat([torch.arange(20), torch.arange(10)])
    queue.enqueue(torch.randn(30, 6), ids)
    labels = torch.arange(30) % 4
    labels[::3] = -1
    return queue, labels


def slow_choice(queue, row, sample, labels, restrict, drawn):
    """The slot that one row takes, written from the rule."""
    found = []
    for slot in range(queue.size):
        entry = int(queue.sample_ids[slot])
        cosine = float(F.cosine_similarity(row, queue.entries[slot], dim=0))
        same = entry >= 0 and labels[sample] >= 0 and labels[entry] == labels[sample] and entry != sample
        found.append((-1.0 if entry == sample else cosine, same, slot))
    if restrict and any(same for _, same, _ in found):
        found = [each for each in found if each[1]]
    nearest = sorted(found, key=lambda each: -each[0])[: queue.top_k]
    of_class = [each for each in nearest if each[1]]
    candidates = of_class or nearest
    return candidates[drawn * len(candidates) // queue.top_k][2]


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("top_k", [1, 5])
def test_every_row_takes_what_the_rule_says(filled, restrict, top_k):
    queue, labels = filled
    queue.top_k, queue.guide = top_k, Guide(labels, restrict)
    z, ids = torch.randn(60, 6), torch.arange(30)
    choice = None if top_k == 1 else torch.randint(top_k, (60,))
    found = queue.lookup(z, ids, choice=choice)
    rows = ids.repeat(2).tolist()
    drawn = [0] * 60 if choice is None else choice.tolist()
    expected = [
        slow_choice(queue, z[row], sample, labels, restrict, drawn[row]) for row, sample in enumerate(rows)
    ]  # fmt: skip
    assert found.indices.tolist() == expected
    if restrict:  # every class has other images in the queue
        known = [row for row, sample in enumerate(rows) if labels[sample] >= 0]
        assert all(labels[queue.sample_ids[found.indices[row]]] == labels[rows[row]] for row in known)


@pytest.mark.parametrize("restrict", [False, True])
def test_images_without_a_label_look_up_as_ever(filled, restrict):
    queue, labels = filled
    z, ids, choice = torch.randn(30, 6), torch.arange(30), torch.randint(5, (30,))
    plain = queue.lookup(z, ids, choice=choice).indices
    queue.guide = Guide(labels, restrict)
    guided = queue.lookup(z, ids, choice=choice).indices
    unknown = labels[ids] < 0
    assert guided[unknown].tolist() == plain[unknown].tolist()
    assert guided.tolist() != plain.tolist()
    queue.guide = Guide(torch.full_like(labels, -1), restrict)
    assert queue.lookup(z, ids, choice=choice).indices.tolist() == plain.tolist()


def test_a_share_of_every_class_is_known():
    labels = np.repeat(np.arange(5), [100, 100, 40, 3, 1])
    kept = known_labels(labels, 0.1, seed=3).numpy()
    assert [int((kept == number).sum()) for number in range(5)] == [10, 10, 4, 1, 1]
    assert (kept[kept >= 0] == labels[kept >= 0]).all()
    assert (known_labels(labels, 0.1, seed=3).numpy() == kept).all()
    assert (known_labels(labels, 0.1, seed=4).numpy() != kept).any()
    assert (known_labels(labels, 1.0, seed=0).numpy() == labels).all()
