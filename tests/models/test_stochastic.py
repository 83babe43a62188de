"""Dropout that draws by row: how much it drops, and that nothing follows from anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_refiner.core.collectives import Rows, use_rows
from mim_refiner.models.stochastic import RowDropout


def kept(rows: int, p: float = 0.3, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    values = RowDropout(p)(torch.ones(rows, 20, 50))
    assert torch.allclose(values[values > 0], torch.tensor(1 / (1 - p)))
    return (values > 0).double().flatten(1)


def test_the_share_that_is_dropped_is_the_one_asked_for() -> None:
    for p in (0.01, 0.3, 0.9):
        deviation = (p * (1 - p) / 200_000) ** 0.5
        assert abs(1 - kept(200, p).mean().item() - p) < 4 * deviation


def test_rows_places_and_passes_drop_independently() -> None:
    one, other = kept(200), kept(200, seed=1)
    for first, second in ((one, other), (one[:-1], one[1:]), (one[:, :-1], one[:, 1:]), (one[:, :-50], one[:, 50:])):
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(correlation.item()) < 4 / first.numel() ** 0.5
    assert len(one.unique(dim=0)) == 200


def test_a_part_of_the_batch_drops_what_the_whole_drops_there() -> None:
    whole = kept(2 * 6)
    with use_rows(Rows(1, 3, 6)):  # of two views
        assert torch.equal(kept(2 * 2), whole[[1, 2, 7, 8]])


def test_nothing_is_dropped_in_evaluation() -> None:
    assert torch.equal(RowDropout(0.5).eval()(torch.ones(3, 4)), torch.ones(3, 4))


def test_no_row_has_the_mask_of_another_moved_along() -> None:
    """Were places added to the number of a row, two of these 512 rows would share 564 values."""
    torch.manual_seed(0)
    masks = RowDropout(0.5)(torch.ones(512, 1500)) > 0
    starts = masks[:, :64].numpy()
    for row, mask in enumerate(masks.numpy()):
        text = mask.tobytes()
        assert not [other for other in range(len(starts)) if other != row and starts[other].tobytes() in text]


def test_all_is_dropped_at_one_and_nothing_of_nothing() -> None:
    values = torch.ones(3, 4, requires_grad=True)
    dropped = RowDropout(1.0)(values)
    dropped.sum().backward()
    assert torch.equal(dropped, torch.zeros(3, 4))
    assert torch.equal(values.grad, torch.zeros(3, 4))
    assert RowDropout(0.5)(torch.ones(0, 4)).shape == (0, 4)
