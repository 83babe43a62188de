from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.core import neighbors
from mim_refiner.core.guidance import Guide
from mim_refiner.core.neighbors import NeighborQueue
from mim_refiner.errors import InputError

BUFFERS = {"entries": "x", "sample_ids": "idx", "age": "age", "pointer": "ptr"}  # ours: name in the reference


def queue_from(data: dict[str, Tensor], prefix: str, top_k: int) -> NeighborQueue:
    queue = NeighborQueue(*data[f"{prefix}/x"].shape, top_k=top_k)
    queue.load_state_dict({ours: data[f"{prefix}/{theirs}"] for ours, theirs in BUFFERS.items()})
    return queue


def filled_queue(size: int = 10, dim: int = 4, top_k: int = 1) -> NeighborQueue:
    queue = NeighborQueue(size, dim, top_k=top_k)
    queue.enqueue(torch.randn(6, dim), torch.arange(6))
    return queue


@pytest.mark.parametrize("top_k", [1, 20])
def test_golden_eight_updates(golden_dir: Path, top_k: int) -> None:
    data = load_file(golden_dir / "queue" / f"queue_topk{top_k}.safetensors")
    queue = queue_from(data, "init", top_k)
    for step in range(8):
        x, ids, choice = (data[f"step{step}/{key}"] for key in ("x", "idx", "choice"))
        age_before = queue.age.clone()
        found = queue.lookup(x, ids, choice=choice)
        assert torch.equal(found.indices, data[f"step{step}/nn_qidx"])
        assert torch.equal(found.neighbors, data[f"step{step}/nn_x"])
        assert torch.equal(found.age, age_before[found.indices])
        assert torch.equal(found.age.float(), data[f"step{step}/metric/nn-age"])
        chosen = data[f"step{step}/topk_sim"].gather(1, choice).squeeze(1)
        torch.testing.assert_close(found.similarity, chosen, rtol=0, atol=1e-6)
        queue.enqueue(x[:12], ids)  # only view 0
        for ours, theirs in BUFFERS.items():
            assert torch.equal(getattr(queue, ours), data[f"step{step}/after/{theirs}"]), (step, ours)
    found = queue.lookup(data["eval/x"], data["eval/idx"], exclude_same=False, choice=data["eval/choice"])
    assert torch.equal(found.neighbors, data["eval/nn_x"])
    assert torch.equal(found.indices, data["eval/topk_idx"].gather(1, data["eval/choice"]).squeeze(1))


def test_golden_vectors_exercise_the_mask(golden_dir: Path) -> None:
    """Guards the test above: without the mask some recorded neighbours would be others."""
    data = load_file(golden_dir / "queue" / "queue_topk1.safetensors")
    different = 0
    for step in range(1, 8):
        queue = queue_from(data, f"step{step - 1}/after", 1)
        unmasked = queue.lookup(data[f"step{step}/x"], data[f"step{step}/idx"], exclude_same=False).indices
        different += int((unmasked != data[f"step{step}/nn_qidx"]).sum())
    assert different > 0


def test_equals_a_slow_loop() -> None:
    queue = filled_queue(30, 4, top_k=3)
    z, ids, choice = torch.randn(8, 4), torch.arange(4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    found = queue.lookup(z, ids, choice=choice)
    for row in range(8):
        cosines = []
        for slot in range(30):
            entry = queue.entries[slot]
            cosine = float(z[row] @ entry / (z[row].norm() * entry.norm()))
            cosines.append((-1.0 if queue.sample_ids[slot] == ids[row % 4] else cosine, slot))
        similarity, slot = sorted(cosines, reverse=True)[int(choice[row])]
        assert int(found.indices[row]) == slot
        assert float(found.similarity[row]) == pytest.approx(similarity, abs=1e-6)
        assert torch.equal(found.neighbors[row], queue.entries[slot])


@pytest.mark.parametrize("top_k", [1, 4])
def test_look_up_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    queue = filled_queue(top_k=top_k)
    z, ids, choice = torch.randn(6, 4), torch.arange(3), torch.arange(6) % top_k
    whole = queue.lookup(z, ids, choice=choice)
    monkeypatch.setattr(neighbors, "_MAX_SIMILARITIES", 25)  # two rows at a time
    pieces = queue.lookup(z, ids, choice=choice)
    assert torch.equal(whole.indices, pieces.indices)
    torch.testing.assert_close(whole.similarity, pieces.similarity)


def test_entries_of_the_same_sample_are_excluded_in_every_view() -> None:
    queue = filled_queue()
    own = queue.entries[:3]
    assert queue.lookup(own.repeat(2, 1), torch.arange(3), exclude_same=False).indices.tolist() == [0, 1, 2, 0, 1, 2]
    found = queue.lookup(own.repeat(2, 1), torch.arange(3))
    assert not (queue.sample_ids[found.indices] == torch.arange(3).repeat(2)).any()
    assert queue.lookup(own).indices.tolist() == [0, 1, 2]  # no ids: nothing to exclude


def test_draws_are_uniform_over_the_nearest_and_reproducible() -> None:
    queue = NeighborQueue(50, 4, top_k=5)
    z = torch.randn(1, 4).repeat(4000, 1)
    first = queue.lookup(z, generator=torch.Generator().manual_seed(3)).indices
    assert torch.equal(first, queue.lookup(z, generator=torch.Generator().manual_seed(3)).indices)
    assert not torch.equal(first, queue.lookup(z, generator=torch.Generator().manual_seed(4)).indices)
    slots, counts = first.unique(return_counts=True)
    queue.top_k = 1
    assert len(slots) == 5
    assert int(queue.lookup(z[:1]).indices) in slots.tolist()
    assert float(((counts - 800.0) ** 2 / 800).sum()) < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_look_up_changes_nothing_and_returns_no_view_of_the_queue() -> None:
    queue = filled_queue()
    before = {name: buffer.clone() for name, buffer in queue.state_dict().items()}
    found = queue.lookup(torch.randn(4, 4, requires_grad=True), torch.arange(4))
    assert not found.neighbors.requires_grad
    found.neighbors.zero_()
    for name, buffer in queue.state_dict().items():
        assert torch.equal(buffer, before[name])


def test_entries_changed_from_outside_are_seen() -> None:
    queue = filled_queue()
    queue.lookup(torch.randn(2, 4))
    z = torch.randn(1, 4)
    queue.entries[7] = 3 * z[0]
    assert int(queue.lookup(z).indices) == 7


def test_age_counts_the_samples_since() -> None:
    queue = NeighborQueue(10, 2)
    for start in (0, 4, 8):
        queue.enqueue(torch.randn(4, 2), torch.arange(start, start + 4))
    assert queue.sample_ids.tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert queue.age.tolist() == [4, 4, 12, 12, 8, 8, 8, 8, 4, 4]
    assert queue.pointer.tolist() == [2]


def test_state_dict_holds_everything() -> None:
    queue, other = filled_queue(), NeighborQueue(10, 4)
    assert set(queue.state_dict()) == set(BUFFERS)
    other.load_state_dict(queue.state_dict())
    z, ids = torch.randn(3, 4), torch.arange(3)
    for q in (queue, other):
        q.enqueue(z, ids)
    for name, buffer in queue.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name])


def test_whole_queue_at_once_and_start_entries() -> None:
    queue = NeighborQueue(400, 16)
    assert queue.entries.std() == pytest.approx(1, abs=0.05)  # random-normal start
    assert (queue.sample_ids == -1).all()
    z = torch.randn(400, 16)
    queue.enqueue(z, torch.arange(400))
    assert torch.equal(queue.entries, z)


def test_unusable_input_is_refused() -> None:
    queue = NeighborQueue(4, 3)
    with pytest.raises(InputError, match=r"batch of 5 .* queue of 4"):
        queue.enqueue(torch.randn(5, 3), torch.arange(5))
    with pytest.raises(InputError, match="sample_ids"):
        queue.enqueue(torch.randn(2, 3), torch.arange(3))
    with pytest.raises(InputError, match="width 3"):
        queue.lookup(torch.randn(2, 4))
    with pytest.raises(InputError, match="whole number of views"):
        queue.lookup(torch.randn(3, 3), torch.arange(2))
    with pytest.raises(InputError, match="top_k"):
        NeighborQueue(4, 3, top_k=5)


@pytest.mark.parametrize("most", [None, 1, 2])
@pytest.mark.parametrize(("top_k", "guided"), [(1, False), (4, False), (4, True)])
def test_several_queues_at_once_are_each_alone(
    monkeypatch: pytest.MonkeyPatch, most: int | None, top_k: int, guided: bool
) -> None:
    monkeypatch.setattr(neighbors, "ONE_BY_ONE", {"cpu"} if most is None else set())
    monkeypatch.setattr(neighbors, "_MAX_ENTRIES", (most or 1) * 10 * 4)
    queues = [filled_queue(top_k=top_k) for _ in range(3)]
    if guided:
        for queue in queues:
            queue.guide = Guide(torch.tensor([0, 0, 1, 1, 0, 1]), restrict=True)
    z, ids, choices = torch.randn(3, 6, 4), torch.arange(3), torch.randint(top_k, (3, 6))
    together = neighbors.look_up(queues, z, ids, choices)
    for number, queue in enumerate(queues):
        alone = queue.lookup(z[number], ids, choice=choices[number])
        assert torch.equal(together.indices[number], alone.indices)
        assert torch.equal(together.neighbors[number], alone.neighbors)
        assert torch.equal(together.age[number], alone.age)
        torch.testing.assert_close(together.similarity[number], alone.similarity)
